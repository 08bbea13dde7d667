// What this processor and its operating system offer, asked once.
#pragma once

#include <cstdint>

namespace kvpack {

/// One bit for each feature that an implementation may need.
enum CpuFeature : std::uint32_t {
  kFeatureAvx2 = 1u << 0,    // avx2, fma, f16c, bmi2 and popcnt together: every AVX2 processor since Haswell and Zen
  kFeatureAvx512 = 1u << 1,  // avx512f, bw, dq and vl together: Skylake-X and later, Zen 4 and later
  // avx512vbmi, vbmi2, bitalg, vpopcntdq and gfni on top of kFeatureAvx512: Ice Lake and later, Zen 4 and later
  kFeatureAvx512Vbmi2 = 1u << 2,
  // avx512bf16, amx_tile and amx_bf16 on top of kFeatureAvx512, with the system's permission: Sapphire Rapids and later
  kFeatureAmxBf16 = 1u << 3,
  kFeatureAmxInt8 = 1u << 5,     // amx_tile and amx_int8 on top of kFeatureAvx512Vnni, with the system's permission
  kFeatureAvx512Vnni = 1u << 4,  // avx512vnni on top of kFeatureAvx512: Cascade Lake and later, Zen 4 and later
};

/// The bits that this machine has.
std::uint32_t detect_cpu_features() noexcept;

}  // namespace kvpack
