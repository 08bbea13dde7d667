// CPU feature detection through the compiler's own cpuid code, which also asks whether the system saves the registers.
#include "dispatch/cpu_features.h"

#include <string>

#include "kvpack/dispatch.h"

namespace kvpack {

std::uint32_t detect_cpu_features() noexcept {
  std::uint32_t features = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
                        __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_vbmi2 = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                         __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("avx512vpopcntdq") &&
                         __builtin_cpu_supports("gfni");
  if (has_avx2) features |= kFeatureAvx2;
  if (has_avx2 && has_avx512) features |= kFeatureAvx512;
  if (has_avx2 && has_avx512 && has_vbmi2) features |= kFeatureAvx512Vbmi2;
#endif
  return features;
}

std::string cpu_features() {
  std::string words;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const auto note = [&words](bool present, const char* name) {
    if (!present) return;
    if (!words.empty()) words += ' ';
    words += name;
  };
  note(__builtin_cpu_supports("avx2"), "avx2");
  note(__builtin_cpu_supports("fma"), "fma");
  note(__builtin_cpu_supports("f16c"), "f16c");
  note(__builtin_cpu_supports("bmi2"), "bmi2");
  note(__builtin_cpu_supports("avx512f"), "avx512f");
  note(__builtin_cpu_supports("avx512bw"), "avx512bw");
  note(__builtin_cpu_supports("avx512dq"), "avx512dq");
  note(__builtin_cpu_supports("avx512vl"), "avx512vl");
  note(__builtin_cpu_supports("avx512vbmi"), "avx512vbmi");
  note(__builtin_cpu_supports("avx512vbmi2"), "avx512vbmi2");
  note(__builtin_cpu_supports("avx512bitalg"), "avx512bitalg");
  note(__builtin_cpu_supports("avx512vpopcntdq"), "avx512vpopcntdq");
  note(__builtin_cpu_supports("gfni"), "gfni");
  note(__builtin_cpu_supports("avx512vnni"), "avx512vnni");
  note(__builtin_cpu_supports("avx512bf16"), "avx512bf16");
#endif
  return words.empty() ? "none that kvpack asks for" : words;
}

}  // namespace kvpack
