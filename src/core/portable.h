// Marks a rule that the CPU and the CUDA side share, so that it is written once.
#pragma once

#if defined(__CUDACC__)
#define KVPACK_HOST_DEVICE __host__ __device__
#else
#define KVPACK_HOST_DEVICE
#endif
