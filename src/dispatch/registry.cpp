// The list of implementations, the choice between them, forcing and explaining.
#include "dispatch/registry.h"

#include <array>
#include <cstdlib>
#include <mutex>
#include <optional>

#include "attend/implementations.h"
#include "codebook/implementations.h"
#include "core/check.h"
#include "dispatch/cpu_features.h"
#include "evaluate/implementations.h"
#include "flatquant/implementations.h"
#include "formats/tile64/implementations.h"
#include "klt/implementations.h"
#include "kvpack/dispatch.h"
#include "prune/implementations.h"
#include "quantize/implementations.h"
#include "transform/implementations.h"

namespace kvpack {

namespace {

constexpr std::uint32_t kNothing = 0;
constexpr std::array kOperations{
    Operation::kPruneMagnitude,    Operation::kRotate,          Operation::kSimulateUniform,
    Operation::kSimulateQuantized, Operation::kFindCompatGrids, Operation::kAccumulateHistogram,
    Operation::kCompressTile64,    Operation::kUnpackTile64,    Operation::kCheckTile64,
    Operation::kMultiplyTile64,    Operation::kAttendTile64,    Operation::kKronQuantize,
    Operation::kDequantizeInt4,    Operation::kUndoTransform,   Operation::kLinearW4A4,
    Operation::kSimulateKlt,       Operation::kCompressKlt,     Operation::kUnpackKlt,
    Operation::kCompareTensors,    Operation::kCompareLogits};

/// A row of the CPU side. Naming the operation's type makes the compiler check the function against it.
template <typename Function>
Implementation cpu_row(Operation operation, const char* name, std::uint32_t needs, Function function) {
  return {operation, name, DeviceKind::kCpu, needs, reinterpret_cast<AnyFunction>(function)};
}

/// THE list: each operation from slowest to fastest.
const std::vector<Implementation>& cpu_rows() {
  static const std::vector<Implementation> rows{
      cpu_row<PruneFunction>(Operation::kPruneMagnitude, "reference", kNothing, reference::prune_magnitude),
      cpu_row<PruneFunction>(Operation::kPruneMagnitude, "scalar", kNothing, scalar::prune_magnitude),
      cpu_row<RotateFunction>(Operation::kRotate, "reference", kNothing, reference::rotate),
      cpu_row<RotateFunction>(Operation::kRotate, "scalar", kNothing, scalar::rotate),
      cpu_row<UniformFunction>(Operation::kSimulateUniform, "reference", kNothing, reference::simulate_uniform),
      cpu_row<UniformFunction>(Operation::kSimulateUniform, "scalar", kNothing, scalar::simulate_uniform),
      cpu_row<UniformFunction>(Operation::kSimulateQuantized, "reference", kNothing, reference::simulate_uniform),
      cpu_row<UniformFunction>(Operation::kSimulateQuantized, "scalar", kNothing, scalar::simulate_uniform),
      cpu_row<CompatGridsFunction>(Operation::kFindCompatGrids, "reference", kNothing, reference::find_compat_grids),
      cpu_row<HistogramFunction>(Operation::kAccumulateHistogram, "reference", kNothing,
                                 reference::accumulate_histogram),
      cpu_row<HistogramFunction>(Operation::kAccumulateHistogram, "scalar", kNothing, scalar::accumulate_histogram),
      cpu_row<CompressTile64Function>(Operation::kCompressTile64, "reference", kNothing, reference::compress_tile64),
      cpu_row<CompressTile64Function>(Operation::kCompressTile64, "scalar", kNothing, scalar::compress_tile64),
      cpu_row<UnpackTile64Function>(Operation::kUnpackTile64, "reference", kNothing, reference::unpack_tile64),
      cpu_row<UnpackTile64Function>(Operation::kUnpackTile64, "scalar", kNothing, scalar::unpack_tile64),
      cpu_row<CheckTile64Function>(Operation::kCheckTile64, "reference", kNothing, reference::check_tile64),
      cpu_row<MultiplyTile64Function>(Operation::kMultiplyTile64, "reference", kNothing, reference::multiply_tile64),
      cpu_row<MultiplyTile64Function>(Operation::kMultiplyTile64, "scalar", kNothing, scalar::multiply_tile64),
      cpu_row<AttendTile64Function>(Operation::kAttendTile64, "reference", kNothing, reference::attend_tile64),
      cpu_row<AttendTile64Function>(Operation::kAttendTile64, "scalar", kNothing, scalar::attend_tile64),
      cpu_row<KronQuantizeFunction>(Operation::kKronQuantize, "reference", kNothing, reference::kron_quantize),
      cpu_row<KronQuantizeFunction>(Operation::kKronQuantize, "scalar", kNothing, scalar::kron_quantize),
      cpu_row<DequantizeInt4Function>(Operation::kDequantizeInt4, "reference", kNothing, reference::dequantize_int4),
      cpu_row<DequantizeInt4Function>(Operation::kDequantizeInt4, "scalar", kNothing, scalar::dequantize_int4),
      cpu_row<UndoTransformFunction>(Operation::kUndoTransform, "reference", kNothing, reference::undo_transform),
      cpu_row<UndoTransformFunction>(Operation::kUndoTransform, "scalar", kNothing, scalar::undo_transform),
      cpu_row<LinearW4A4Function>(Operation::kLinearW4A4, "reference", kNothing, reference::linear_w4a4),
      cpu_row<LinearW4A4Function>(Operation::kLinearW4A4, "scalar", kNothing, scalar::linear_w4a4),
      cpu_row<SimulateKltFunction>(Operation::kSimulateKlt, "reference", kNothing, reference::simulate_klt),
      cpu_row<SimulateKltFunction>(Operation::kSimulateKlt, "scalar", kNothing, scalar::simulate_klt),
      cpu_row<CompressKltFunction>(Operation::kCompressKlt, "reference", kNothing, reference::compress_klt),
      cpu_row<CompressKltFunction>(Operation::kCompressKlt, "scalar", kNothing, scalar::compress_klt),
      cpu_row<UnpackKltFunction>(Operation::kUnpackKlt, "reference", kNothing, reference::unpack_klt),
      cpu_row<UnpackKltFunction>(Operation::kUnpackKlt, "scalar", kNothing, scalar::unpack_klt),
      cpu_row<CompareTensorsFunction>(Operation::kCompareTensors, "reference", kNothing, reference::compare_tensors),
      cpu_row<CompareLogitsFunction>(Operation::kCompareLogits, "reference", kNothing, reference::compare_logits),
      cpu_row<CompareLogitsFunction>(Operation::kCompareLogits, "scalar", kNothing, scalar::compare_logits),
#if defined(__x86_64__)
      cpu_row<DequantizeInt4Function>(Operation::kDequantizeInt4, "avx2", kFeatureAvx2, avx2::dequantize_int4),
      cpu_row<DequantizeInt4Function>(Operation::kDequantizeInt4, "avx512", kFeatureAvx512, avx512::dequantize_int4),
      cpu_row<LinearW4A4Function>(Operation::kLinearW4A4, "avx2", kFeatureAvx2, avx2::linear_w4a4),
      cpu_row<LinearW4A4Function>(Operation::kLinearW4A4, "avx512", kFeatureAvx512Vnni, avx512::linear_w4a4),
      cpu_row<LinearW4A4Function>(Operation::kLinearW4A4, "amx", kFeatureAmxInt8, amx::linear_w4a4),
      cpu_row<KronQuantizeFunction>(Operation::kKronQuantize, "avx2", kFeatureAvx2, avx2::kron_quantize),
      cpu_row<KronQuantizeFunction>(Operation::kKronQuantize, "avx512", kFeatureAvx512, avx512::kron_quantize),
      cpu_row<KronQuantizeFunction>(Operation::kKronQuantize, "amx", kFeatureAmxBf16, amx::kron_quantize),
      cpu_row<UndoTransformFunction>(Operation::kUndoTransform, "avx2", kFeatureAvx2, avx2::undo_transform),
      cpu_row<UndoTransformFunction>(Operation::kUndoTransform, "avx512", kFeatureAvx512, avx512::undo_transform),
      cpu_row<PruneFunction>(Operation::kPruneMagnitude, "avx2", kFeatureAvx2, avx2::prune_magnitude),
      cpu_row<PruneFunction>(Operation::kPruneMagnitude, "avx512", kFeatureAvx512, avx512::prune_magnitude),
      cpu_row<RotateFunction>(Operation::kRotate, "avx2", kFeatureAvx2, avx2::rotate),
      cpu_row<RotateFunction>(Operation::kRotate, "avx512", kFeatureAvx512, avx512::rotate),
      cpu_row<UniformFunction>(Operation::kSimulateUniform, "avx2", kFeatureAvx2, avx2::simulate_uniform),
      cpu_row<UniformFunction>(Operation::kSimulateUniform, "avx512", kFeatureAvx512, avx512::simulate_uniform),
      cpu_row<UniformFunction>(Operation::kSimulateQuantized, "avx2", kFeatureAvx2, avx2::simulate_uniform),
      cpu_row<UniformFunction>(Operation::kSimulateQuantized, "avx512", kFeatureAvx512, avx512::simulate_uniform),
      cpu_row<HistogramFunction>(Operation::kAccumulateHistogram, "avx2", kFeatureAvx2, avx2::accumulate_histogram),
      cpu_row<HistogramFunction>(Operation::kAccumulateHistogram, "avx512", kFeatureAvx512,
                                 avx512::accumulate_histogram),
      cpu_row<CompressTile64Function>(Operation::kCompressTile64, "avx2", kFeatureAvx2, avx2::compress_tile64),
      cpu_row<CompressTile64Function>(Operation::kCompressTile64, "avx512", kFeatureAvx512Vbmi2,
                                      avx512::compress_tile64),
      cpu_row<UnpackTile64Function>(Operation::kUnpackTile64, "avx2", kFeatureAvx2, avx2::unpack_tile64),
      cpu_row<UnpackTile64Function>(Operation::kUnpackTile64, "avx512", kFeatureAvx512Vbmi2, avx512::unpack_tile64),
      cpu_row<MultiplyTile64Function>(Operation::kMultiplyTile64, "avx2", kFeatureAvx2, avx2::multiply_tile64),
      cpu_row<MultiplyTile64Function>(Operation::kMultiplyTile64, "avx512", kFeatureAvx512Vbmi2,
                                      avx512::multiply_tile64),
      cpu_row<AttendTile64Function>(Operation::kAttendTile64, "avx2", kFeatureAvx2, avx2::attend_tile64),
      cpu_row<AttendTile64Function>(Operation::kAttendTile64, "avx512", kFeatureAvx512Vbmi2, avx512::attend_tile64),
      cpu_row<SimulateKltFunction>(Operation::kSimulateKlt, "avx2", kFeatureAvx2, avx2::simulate_klt),
      cpu_row<SimulateKltFunction>(Operation::kSimulateKlt, "avx512", kFeatureAvx512, avx512::simulate_klt),
      cpu_row<CompressKltFunction>(Operation::kCompressKlt, "avx2", kFeatureAvx2, avx2::compress_klt),
      cpu_row<CompressKltFunction>(Operation::kCompressKlt, "avx512", kFeatureAvx512, avx512::compress_klt),
      cpu_row<UnpackKltFunction>(Operation::kUnpackKlt, "avx2", kFeatureAvx2, avx2::unpack_klt),
      cpu_row<UnpackKltFunction>(Operation::kUnpackKlt, "avx512", kFeatureAvx512, avx512::unpack_klt),
      cpu_row<CompareLogitsFunction>(Operation::kCompareLogits, "avx2", kFeatureAvx2, avx2::compare_logits),
      cpu_row<CompareLogitsFunction>(Operation::kCompareLogits, "avx512", kFeatureAvx512, avx512::compare_logits),
#endif
  };
  return rows;
}

std::span<const Implementation> rows_of(DeviceKind device) {
  return device == DeviceKind::kCuda ? cuda_implementations() : std::span<const Implementation>(cpu_rows());
}

bool runs_here(const Implementation& row) {
  if (row.device == DeviceKind::kCuda) return row.least_capability <= cuda_capability();
  static const std::uint32_t features = detect_cpu_features();
  return (row.needs & ~features) == 0;
}

std::string capability_text(std::int32_t capability) {
  return text("compute capability ", capability / 10, ".", capability % 10);
}

/// What a row asks of the machine; empty: nothing.
std::string needs_text(const Implementation& row) {
  if (row.least_capability != 0) return capability_text(row.least_capability);
  const std::uint32_t needs = row.needs;
  if (needs & kFeatureAmxInt8) return "avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512vnni amx_int8";
  if (needs & kFeatureAvx512Vnni) return "avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512vnni";
  if (needs & kFeatureAmxBf16) return "avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512bf16 amx_bf16";
  if (needs & kFeatureAvx512Vbmi2) {
    return "avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512vbmi avx512vbmi2 avx512bitalg avx512vpopcntdq gfni";
  }
  if (needs & kFeatureAvx512) return "avx2 fma f16c avx512f avx512bw avx512dq avx512vl";
  if (needs & kFeatureAvx2) return "avx2 fma f16c bmi2 popcnt";
  return "";
}

const char* name_of_device(DeviceKind device) { return device == DeviceKind::kCpu ? "cpu" : "cuda"; }

/// What this machine has of that, for an error.
std::string has_text(DeviceKind device) {
  if (device == DeviceKind::kCpu) return text("this processor has ", cpu_features());
  return text("the least capable GPU here has ", capability_text(cuda_capability()), " (", cuda_status(), ")");
}

std::mutex forced_mutex;

/// The forced name; starts as KVPACK_IMPL. Guarded by forced_mutex.
std::string& forced_name() {
  static std::string name = [] {
    const char* from_environment = std::getenv("KVPACK_IMPL");
    return std::string(from_environment == nullptr ? "" : from_environment);
  }();
  return name;
}

std::string read_forced_name() {
  const std::lock_guard lock(forced_mutex);
  return forced_name();
}

/// Adds a name to a list, "reference, scalar".
void append(std::string& list, const char* name) {
  if (!list.empty()) list += ", ";
  list += name;
}

/// Names of an operation's rows, "reference, scalar, avx2".
std::string names_text(Operation operation, DeviceKind device) {
  std::string names;
  for (const Implementation& row : rows_of(device)) {
    if (row.operation == operation) append(names, row.name);
  }
  return names.empty() ? "none" : names;
}

/// True when any operation has an implementation of that name on that device.
bool device_has_name(const std::string& name, DeviceKind device) {
  for (const Implementation& row : rows_of(device)) {
    if (row.name == name) return true;
  }
  return false;
}

/// True when any operation has an implementation of that name.
bool has_name(const std::string& name) {
  return device_has_name(name, DeviceKind::kCpu) || device_has_name(name, DeviceKind::kCuda);
}

struct Choice {
  const Implementation* row = nullptr;  // null: nothing fits
  std::string reason;
};

/// An operation that lacks the forced name (compare_tensors has no SIMD) runs its best; a forced name of the other
/// device does not concern this one.
Choice choose(Operation operation, DeviceKind device) {
  const std::string forced = read_forced_name();
  if (!forced.empty() && !has_name(forced)) {
    return {nullptr, text("KVPACK_IMPL is \"", forced, "\"; ", name_of(operation), " has ",
                          names_text(operation, device), " on ", name_of_device(device))};
  }
  const Implementation* best = nullptr;
  const Implementation* named = nullptr;
  const Implementation* easiest = nullptr;  // the slowest row, which asks for least
  for (const Implementation& row : rows_of(device)) {
    if (row.operation != operation) continue;
    if (easiest == nullptr) easiest = &row;
    if (runs_here(row)) best = &row;
    if (row.name == forced) named = &row;
  }
  if (named != nullptr && !runs_here(*named)) {
    return {nullptr, text("forced \"", forced, "\" needs ", needs_text(*named), "; ", has_text(device))};
  }
  if (named != nullptr) return {named, text("forced by name: \"", forced, "\"")};
  if (best == nullptr && easiest != nullptr) {
    return {nullptr, text(name_of(operation), " on ", name_of_device(device), " needs ", needs_text(*easiest), "; ",
                          has_text(device))};
  }
  if (best == nullptr) {
    return {nullptr, text(name_of(operation), " has no implementation on ", name_of_device(device), "; there it has ",
                          names_text(operation, device), ", on cpu ", names_text(operation, DeviceKind::kCpu),
                          device == DeviceKind::kCuda ? "; the CUDA side is " + cuda_status() : "")};
  }
  if (!forced.empty() && device_has_name(forced, device)) {
    return {best, text("\"", forced, "\" is forced, but this operation has only ", names_text(operation, device))};
  }
  return {best, "the fastest one that this machine can run"};
}

thread_local const char* last_name = "";

}  // namespace

const char* name_of(Operation operation) noexcept {
  switch (operation) {
    case Operation::kPruneMagnitude:
      return "prune_magnitude";
    case Operation::kRotate:
      return "rotate";
    case Operation::kSimulateUniform:
      return "simulate_uniform";
    case Operation::kSimulateQuantized:
      return "simulate_quantized";
    case Operation::kFindCompatGrids:
      return "find_compat_grids";
    case Operation::kAccumulateHistogram:
      return "accumulate_histogram";
    case Operation::kCompressTile64:
      return "compress_tile64";
    case Operation::kUnpackTile64:
      return "unpack_tile64";
    case Operation::kCheckTile64:
      return "check_tile64";
    case Operation::kMultiplyTile64:
      return "multiply_tile64";
    case Operation::kAttendTile64:
      return "attend_tile64";
    case Operation::kKronQuantize:
      return "kron_quantize";
    case Operation::kDequantizeInt4:
      return "dequantize_int4";
    case Operation::kUndoTransform:
      return "undo_transform";
    case Operation::kLinearW4A4:
      return "linear_w4a4";
    case Operation::kSimulateKlt:
      return "simulate_klt";
    case Operation::kCompressKlt:
      return "compress_klt";
    case Operation::kUnpackKlt:
      return "unpack_klt";
    case Operation::kCompareTensors:
      return "compare_tensors";
    case Operation::kCompareLogits:
      return "compare_logits";
  }
  return "unknown";
}

const Implementation& select_row(Operation operation, DeviceKind device) {
  const Choice choice = choose(operation, device);
  if (choice.row == nullptr) throw Unsupported(choice.reason);
  return *choice.row;
}

void note_last_implementation(const Implementation& row) noexcept { last_name = row.name; }

std::string last_implementation() { return last_name; }

std::vector<ImplementationInfo> list_implementations() {
  std::vector<ImplementationInfo> result;
  for (const DeviceKind device : {DeviceKind::kCpu, DeviceKind::kCuda}) {
    for (const Operation operation : kOperations) {
      const Implementation* chosen = choose(operation, device).row;
      for (const Implementation& row : rows_of(device)) {
        if (row.operation != operation) continue;
        result.push_back({name_of(operation), row.name, device, needs_text(row), runs_here(row), &row == chosen});
      }
    }
  }
  return result;
}

std::string explain(const std::string& operation_name, DeviceKind device) {
  std::string known;
  std::optional<Operation> operation;
  for (const Operation candidate : kOperations) {
    if (operation_name == name_of(candidate)) operation = candidate;
    append(known, name_of(candidate));
  }
  require(operation.has_value(), "there is no operation \"", operation_name, "\"; there are ", known);
  const Choice choice = choose(*operation, device);
  std::string lines =
      choice.row == nullptr
          ? text(operation_name, " on ", name_of_device(device), " cannot run: ", choice.reason)
          : text(operation_name, " on ", name_of_device(device), " runs ", choice.row->name, ": ", choice.reason);
  for (const Implementation& row : rows_of(device)) {
    if (row.operation != *operation) continue;
    lines += text("\n  ", row.name, runs_here(row) ? ": can run" : ": cannot run, needs " + needs_text(row));
  }
  return lines;
}

void force_implementation(const std::string& name) {
  if (!name.empty()) {
    require(has_name(name), "no operation has an implementation \"", name, "\"; simulate_uniform has ",
            names_text(Operation::kSimulateUniform, DeviceKind::kCpu), " on cpu and ",
            names_text(Operation::kSimulateUniform, DeviceKind::kCuda), " on cuda");
    for (const Implementation& row : cpu_rows()) {
      if (row.name == name && !runs_here(row)) {
        throw Unsupported(text("\"", name, "\" needs ", needs_text(row), "; ", has_text(DeviceKind::kCpu)));
      }
    }
  }
  const std::lock_guard lock(forced_mutex);
  forced_name() = name;
}

}  // namespace kvpack
