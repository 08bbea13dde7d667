// CPU feature detection through the compiler's own cpuid code, which also asks whether the system saves the registers.
#include "dispatch/cpu_features.h"

#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kvpack/dispatch.h"

namespace kvpack {

namespace {

// Bits of edx in leaf 7 of cpuid: the compiler's own detection does not know AMX.
constexpr unsigned kCpuidAmxBf16 = 1u << 22;
constexpr unsigned kCpuidAmxInt8 = 1u << 25;

/// True when the processor has that part of AMX and Linux lets this process use its registers, which it must be asked for.
bool may_use_amx([[maybe_unused]] unsigned part) noexcept {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kAmxTile = 1u << 24;
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & part) == 0 || (d & kAmxTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

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
  if (has_avx2 && has_avx512 && __builtin_cpu_supports("avx512vnni")) features |= kFeatureAvx512Vnni;
  if ((features & kFeatureAvx512Vnni) != 0 && may_use_amx(kCpuidAmxInt8)) features |= kFeatureAmxInt8;
  const bool has_bf16 = has_avx2 && has_avx512 && __builtin_cpu_supports("avx512bf16");
  if (has_bf16 && may_use_amx(kCpuidAmxBf16)) features |= kFeatureAmxBf16;
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
  note(may_use_amx(kCpuidAmxBf16), "amx_bf16");
  note(may_use_amx(kCpuidAmxInt8), "amx_int8");
#endif
  return words.empty() ? "none that kvpack asks for" : words;
}

}  // namespace kvpack
