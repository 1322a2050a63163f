// Checks of arguments, and the exceptions that become Python's.
#pragma once

#include <sstream>
#include <stdexcept>

namespace tvmf {

// std::invalid_argument is a ValueError in Python, std::out_of_range an IndexError.
template <class... Args>
[[noreturn]] void fail(const Args&... message) {
  std::ostringstream text;
  (text << ... << message);
  throw std::invalid_argument(text.str());
}

// The message is built only where the check fails: a small head would feel the time.
#define TVMF_CHECK(ok, ...) \
  if (!(ok)) fail(__VA_ARGS__)

}  // namespace tvmf
