// The numbers of a plan by name, as Python and the emulator read them. The names are those of the
// classes of tvmf_ext/planning.py.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

namespace tvmf {

struct PlanField {
  std::string name;
  std::variant<bool, int64_t, double, std::string> value;
};

}  // namespace tvmf
