// Loads libkvpack_cuda.so from the folder of libkvpack.so on first use, and says what came of it.
#include "dispatch/cuda_library.h"

#include <dlfcn.h>

#include <string>

#include "core/check.h"
#include "kvpack/dispatch.h"

namespace kvpack {

namespace {

struct LoadedCuda {
  std::span<const Implementation> rows;
  std::string status;
  std::int32_t capability = 0;
};

/// The folder that holds this shared library, with its last slash.
std::string own_folder() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&cuda_implementations), &info) == 0 || info.dli_fname == nullptr) return "";
  const std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/') + 1);
}

LoadedCuda load_cuda() {
  const std::string path = own_folder() + "libkvpack_cuda.so";
  // The handle stays open for the life of the process: rows point into the library.
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* reason = dlerror();
    return {{}, text("not loaded: ", reason == nullptr ? path.c_str() : reason)};
  }
  const auto function = reinterpret_cast<CudaLibraryFunction>(dlsym(handle, kCudaLibrarySymbol));
  if (function == nullptr) return {{}, text("not loaded: ", path, " exports no ", kCudaLibrarySymbol)};
  const CudaLibrary* library = function();
  if (library->version != kCudaLibraryVersion) {
    return {{}, text("not loaded: ", path, " has version ", library->version, ", expected ", kCudaLibraryVersion)};
  }
  if (library->num_devices == 0) return {{}, text("built, but no GPU: ", library->status)};
  return {{library->rows, static_cast<std::size_t>(library->num_rows)},
          text("loaded: ", library->status),
          library->capability};
}

const LoadedCuda& loaded_cuda() {
  static const LoadedCuda loaded = load_cuda();
  return loaded;
}

}  // namespace

std::span<const Implementation> cuda_implementations() { return loaded_cuda().rows; }

std::int32_t cuda_capability() { return loaded_cuda().capability; }

std::string cuda_status() { return loaded_cuda().status; }

}  // namespace kvpack
