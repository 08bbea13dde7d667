// libFuzzer on tiles whose bytes are not to be trusted: unpack, check, multiply and attend.
//   CXX=clang++ cmake --preset asan -B build/fuzz -DKVPACK_BUILD_FUZZERS=ON && cmake --build build/fuzz --target tile64_fuzz
//   KVPACK_IMPL=avx2 build/fuzz/tests/tile64_fuzz -max_len=4096
#include <algorithm>

#include "support/hostile_tiles.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  kvpack::test::HostileInput input;
  if (size < input.choices.size()) return 0;
  std::copy_n(data, input.choices.size(), input.choices.begin());
  input.noise.assign(data + input.choices.size(), data + size);
  kvpack::set_num_threads(1);
  kvpack::test::run_hostile(input);
  return 0;
}
