// Where a matrix holds a number that is not finite: asked before anything is written.
#pragma once

#include "klt/implementations.h"

namespace kvpack::klt {

/// The first place in order of sequence, token and channel, tokens before `first_token` left out; CPU memory.
KltPlace find_nonfinite(const KltMatrix& x, std::int64_t sequences, std::int64_t tokens, std::int64_t channels,
                        std::int64_t first_token);

}  // namespace kvpack::klt
