// Prunes one row of four values to its two largest magnitudes and prints "0 -3 2 0".
#include <cstdio>

#include "kvpack/kvpack.h"

int main() {
  float row[] = {1.0f, -3.0f, 2.0f, 0.5f};
  const kvpack::TensorView view = kvpack::make_view(row, kvpack::DType::kFloat32, {1, 4});
  kvpack::prune_magnitude(view, view, {.sparsity = 0.5});
  std::printf("%g %g %g %g\n", row[0], row[1], row[2], row[3]);
}
