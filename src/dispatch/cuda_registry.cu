// The one function that libkvpack_cuda exports: its rows, and which GPUs it can use.
#include <cuda_runtime.h>

#include <array>
#include <string>

#include "attend/implementations.h"
#include "core/check.h"
#include "dispatch/cuda_library.h"
#include "evaluate/implementations.h"
#include "flatquant/implementations.h"
#include "formats/tile64/implementations.h"
#include "klt/implementations.h"
#include "prune/implementations.h"
#include "quantize/implementations.h"
#include "transform/implementations.h"

namespace kvpack {

namespace {

/// Naming the operation's type makes the compiler check the function against it.
template <typename Function>
Implementation cuda_row(Operation operation, Function function, const char* name = "cuda") {
  return {operation, name, DeviceKind::kCuda, 0, reinterpret_cast<AnyFunction>(function)};
}

/// A row whose kernels need what GPUs have since 8.0: cp.async, products of bfloat16, its compares. Code for older ones holds a
/// trap in their place. "cuda" of kron_quantize and linear_w4a4 looks at the GPU itself, and runs "cuda_plain" there.
template <typename Function>
Implementation ampere_row(Operation operation, Function function, const char* name = "cuda") {
  Implementation row = cuda_row(operation, function, name);
  row.least_capability = 80;
  return row;
}

/// What the GPUs of this machine are, and how many of them this library has code for.
struct Devices {
  std::int32_t usable = 0;
  std::int32_t capability = 0;  // of the least capable usable one
  std::string text;
};

Devices find_devices() {
  // nvcc's list of what cmake's KVPACK_CUDA_ARCHITECTURES asks for, 100 * major + 10 * minor, the lowest first.
  constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};
  constexpr int kLowest = kArchitectures[0] / 10;
  Devices devices;
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorInsufficientDriver) {
    return {0, 0,
            text("there is no NVIDIA driver, or one that is too old for CUDA ", CUDART_VERSION / 1000, ".",
                 CUDART_VERSION % 1000 / 10)};
  }
  if (status != cudaSuccess) return {0, 0, cudaGetErrorString(status)};
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    const int capability = 10 * properties.major + properties.minor;
    const bool is_usable = capability >= kLowest;
    if (is_usable && (devices.usable == 0 || capability < devices.capability)) devices.capability = capability;
    devices.usable += is_usable;
    devices.text +=
        text(devices.text.empty() ? "" : ", ", properties.name, " (compute capability ", properties.major, ".",
             properties.minor,
             is_usable ? ")" : text("; this library is built for ", kLowest / 10, ".", kLowest % 10, " and later)"));
  }
  if (count == 0) devices.text = "the driver lists no device";
  return devices;
}

}  // namespace

}  // namespace kvpack

/// See dispatch/cuda_library.h. The structure lives as long as the library.
extern "C" __attribute__((visibility("default"))) const kvpack::CudaLibrary* kvpack_cuda_library() {
  using namespace kvpack;
  static const std::array rows{
      cuda_row<PruneFunction>(Operation::kPruneMagnitude, cuda::prune_magnitude),
      cuda_row<RotateFunction>(Operation::kRotate, cuda::rotate),
      cuda_row<UniformFunction>(Operation::kSimulateUniform, cuda::simulate_uniform),
      cuda_row<UniformFunction>(Operation::kSimulateQuantized, cuda::simulate_uniform),
      cuda_row<CompatGridsFunction>(Operation::kFindCompatGrids, cuda::find_compat_grids),
      ampere_row<CompressTile64Function>(Operation::kCompressTile64, cuda::compress_tile64),
      cuda_row<UnpackTile64Function>(Operation::kUnpackTile64, cuda::unpack_tile64),
      cuda_row<CheckTile64Function>(Operation::kCheckTile64, cuda::check_tile64),
      ampere_row<MultiplyTile64Function>(Operation::kMultiplyTile64, cuda::multiply_tile64),
      ampere_row<AttendTile64Function>(Operation::kAttendTile64, cuda::attend_tile64),
      cuda_row<SimulateKltFunction>(Operation::kSimulateKlt, cuda::chains::simulate_klt, "cuda_chains"),
      ampere_row<SimulateKltFunction>(Operation::kSimulateKlt, cuda::mma::simulate_klt, "cuda_mma"),
      ampere_row<SimulateKltFunction>(Operation::kSimulateKlt, cuda::simulate_klt),
      cuda_row<CompressKltFunction>(Operation::kCompressKlt, cuda::chains::compress_klt, "cuda_chains"),
      ampere_row<CompressKltFunction>(Operation::kCompressKlt, cuda::mma::compress_klt, "cuda_mma"),
      ampere_row<CompressKltFunction>(Operation::kCompressKlt, cuda::compress_klt),
      cuda_row<UnpackKltFunction>(Operation::kUnpackKlt, cuda::chains::unpack_klt, "cuda_chains"),
      ampere_row<UnpackKltFunction>(Operation::kUnpackKlt, cuda::mma::unpack_klt, "cuda_mma"),
      ampere_row<UnpackKltFunction>(Operation::kUnpackKlt, cuda::unpack_klt),
      cuda_row<KronQuantizeFunction>(Operation::kKronQuantize, cuda::kron_quantize_plain, "cuda_plain"),
      ampere_row<KronQuantizeFunction>(Operation::kKronQuantize, cuda::kron_quantize_mma, "cuda_mma"),
      cuda_row<KronQuantizeFunction>(Operation::kKronQuantize, cuda::kron_quantize),
      cuda_row<DequantizeInt4Function>(Operation::kDequantizeInt4, cuda::dequantize_int4),
      cuda_row<UndoTransformFunction>(Operation::kUndoTransform, cuda::undo_transform),
      cuda_row<LinearW4A4Function>(Operation::kLinearW4A4, cuda::linear_w4a4_plain, "cuda_plain"),
      cuda_row<LinearW4A4Function>(Operation::kLinearW4A4, cuda::linear_w4a4),
      cuda_row<CompareTensorsFunction>(Operation::kCompareTensors, cuda::compare_tensors),
      cuda_row<CompareLogitsFunction>(Operation::kCompareLogits, cuda::compare_logits),
  };
  static const Devices devices = find_devices();
  static const CudaLibrary library{kCudaLibraryVersion,  devices.usable, devices.capability,
                                   devices.text.c_str(), rows.data(),    static_cast<std::int64_t>(rows.size())};
  return &library;
}
