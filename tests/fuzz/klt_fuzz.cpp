// libFuzzer on transform-coded rows whose bytes are not to be trusted: unpack and check.
//   CXX=clang++ cmake --preset asan -B build/fuzz -DKVPACK_BUILD_FUZZERS=ON && cmake --build build/fuzz --target klt_fuzz
//   KVPACK_IMPL=avx2 build/fuzz/tests/klt_fuzz -max_len=4096
#include "support/hostile_klt.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  kvpack::set_num_threads(1);
  kvpack::test::run_hostile_klt(data, size);
  return 0;
}
