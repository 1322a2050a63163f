#include "cpu/choice.h"

#include <cstdlib>
#include <string>

#include "cpu/isa.h"
#include "torch/check.h"

namespace tvmf::cpu {
namespace {

enum class Wish { kNone, kOwn, kLibrary };

Wish read_wish() {
  const char* text = std::getenv("TVMF_CPU_PRODUCT");
  const std::string wish = text ? text : "";
  TVMF_CHECK(wish.empty() || wish == "own" || wish == "library",
             "the environment variable TVMF_CPU_PRODUCT must be own or library, got ", wish);
  return wish == "own" ? Wish::kOwn : wish == "library" ? Wish::kLibrary : Wish::kNone;
}

// Whether our own products took less time than the library's where both were measured, which was on
// AMD's CPUs alone. The library is Intel's, and is better tuned for Intel's CPUs.
bool measured_faster() {
#ifdef TVMF_X86
  return __builtin_cpu_is("amd") && std::string(capability()) != "baseline";
#else
  return false;
#endif
}

// Both copies of the features in panels take memory beside the head's, which this bounds.
constexpr int64_t kMaxFeatures = int64_t(1) << 23;  // N D
constexpr int64_t kMinRows = 16;                    // a panel has as many columns

}  // namespace

const PanelKernels* own_products(ScalarType input, int64_t N, int64_t C, int64_t D) {
  static const Wish wish = read_wish();
  static const bool faster = measured_faster();
  if (input == ScalarType::Double || wish == Wish::kLibrary) return nullptr;
  if (wish == Wish::kNone &&
      (!faster || N < kMinRows || N * D > kMaxFeatures || C < kPanel || D < kPanel))
    return nullptr;
  const bool pairs = input == ScalarType::BFloat16 && pair_products();
  return pairs ? pair_products() : &float_products();
}

}  // namespace tvmf::cpu
