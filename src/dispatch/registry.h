// The registry: one row for each implementation of each operation, and the choice between them.
// Dispatch happens once per public call, in the entry file of the operation.
#pragma once

#include <cstdint>
#include <span>

#include "kvpack/tensor.h"

namespace kvpack {

enum class Operation : std::int32_t {
  kPruneMagnitude,
  kRotate,
  kSimulateUniform,
  kSimulateQuantized,
  kFindCompatGrids,
  kAccumulateHistogram,
  kCompressTile64,
  kUnpackTile64,
  kCheckTile64,
  kMultiplyTile64,
  kAttendTile64,
  kKronQuantize,
  kDequantizeInt4,
  kUndoTransform,
  kLinearW4A4,
  kSimulateKlt,
  kCompressKlt,
  kUnpackKlt,
  kCompareTensors,
  kCompareLogits,
};

/// The name in public text: "prune_magnitude", ...
const char* name_of(Operation operation) noexcept;

/// Any implementation; select() casts it back to its operation's type.
using AnyFunction = void (*)();

/// One implementation of one operation. Rows of an operation stand from slowest to fastest: the last one that this
/// machine can run is chosen.
struct Implementation {
  Operation operation;
  const char* name;  // "reference", "scalar", "avx2", "avx512", "cuda"
  DeviceKind device;
  std::uint32_t needs;  // CpuFeature bits
  AnyFunction function;
  std::int32_t least_capability = 0;  // of a GPU, 10 * major + minor; 0: whatever the library holds code for
};

/// The row that runs `operation` on `device` now, by the forced name or else the best one.
///   Throws    Unsupported when there is none; the message lists what exists
const Implementation& select_row(Operation operation, DeviceKind device);

/// Notes the row as this thread's last one and returns its function as `Function`, the operation's own type.
template <typename Function>
Function select(Operation operation, DeviceKind device);

void note_last_implementation(const Implementation& row) noexcept;

template <typename Function>
Function select(Operation operation, DeviceKind device) {
  const Implementation& row = select_row(operation, device);
  note_last_implementation(row);
  return reinterpret_cast<Function>(row.function);
}

/// Rows of the CUDA library, empty when it is not loaded: dispatch/cuda_library.cpp.
std::span<const Implementation> cuda_implementations();

/// 10 * major + minor of the least capable GPU that the CUDA library can use, 0 when it is not loaded: rows are chosen for
/// all GPUs.
std::int32_t cuda_capability();

}  // namespace kvpack
