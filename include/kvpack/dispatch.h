// Which implementation of an operation runs on this machine, and why. The one registry of the library.
#pragma once

#include <string>
#include <vector>

#include "kvpack/tensor.h"

namespace [[gnu::visibility("default")]] kvpack {

/// One line of the registry, as doctor and explain show it.
struct ImplementationInfo {
  std::string operation;  ///< "prune_magnitude", "simulate_uniform", ...
  std::string name;       ///< "reference", "scalar", "avx2", "avx512", "cuda"
  DeviceKind device = DeviceKind::kCpu;
  std::string needs;       ///< what the machine must have, "avx2 fma f16c"; empty: nothing
  bool available = false;  ///< this machine has it
  bool selected = false;   ///< this one would run now
};

/// Every implementation that this build contains.
[[nodiscard]] std::vector<ImplementationInfo> list_implementations();

/// Says in a few lines which implementation of `operation` would run on `device` and why.
///   Throws    InvalidArgument when there is no such operation; the message lists those there are
[[nodiscard]] std::string explain(const std::string& operation, DeviceKind device = DeviceKind::kCpu);

/// Forces an implementation by name for every operation of its device; "" goes back to the best one.
///   The environment variable KVPACK_IMPL does the same at start; a call here replaces it.
///   Throws    InvalidArgument when no operation has one of that name; Unsupported when this machine cannot run it
void force_implementation(const std::string& name);

/// Name of the implementation that the last operation on this thread ran; "" before the first.
[[nodiscard]] std::string last_implementation();

/// Features of this processor that kvpack asks for, in words: "avx2 fma f16c avx512f ...".
[[nodiscard]] std::string cpu_features();

/// Says whether the CUDA side is loaded, and if not why: the text is for people.
///   Loads it on first use, from the folder this library is in.
[[nodiscard]] std::string cuda_status();

/// Threads that CPU operations use; 0 asks for one per core that this process may use.
///   Throws    InvalidArgument when negative
void set_num_threads(int num_threads);
[[nodiscard]] int num_threads();

}  // namespace kvpack
