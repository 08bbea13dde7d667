// Per channel: a task takes a tile of channels and sweeps its tokens. One lane owns one channel, so statistics need no
// shuffles. Rows of a tile are long, and a sweep goes through them a few rows at a time, so that memory is read almost
// in order: narrow tiles of a power-of-two stride fall into few cache sets (benches/bench_quantizers.py:
// 64 channels a tile reach 39 % of the copy rate at [2048, 1024], 512 reach more than 60 %).
//
//   channels ->  c0 .. c31 | c32 .. c63 | ...
//   token 0      x x ... x | x x ... x        sweep 1: extremes per run of tokens (one run without outliers)
//   ...          (kRows)   | (kRows)          sweep 2: with outliers only, the elements beyond each channel's pivots
//   token 8      x x ... x | x x ... x        sweep 3: quantise and write

namespace kvpack::KVPACK_ISA {
namespace {

/// Rows that one column of registers goes through before the next column takes its turn.
inline constexpr std::int64_t kRows = 8;

/// Channels of a tile at most: 2 KiB of float32 a token.
inline constexpr std::int64_t kMaxTileChannels = 512;

/// One task's part of the matrix; `channels` is a multiple of the registers' width.
template <typename T>
struct Tile {
  const T* x;
  T* out;
  std::int64_t x_stride;  // elements from token to token
  std::int64_t out_stride;
  std::int64_t tokens;
  std::int64_t channels;
};

/// Per-channel parameters of a tile, [channels] each; the last two are read only where outliers are kept.
struct TileParams {
  const float* qs;
  const float* offset;
  const float* inverse;  // 1 / qs, 0 for a degenerate grid
  const float* upper;
  const float* lower;
};

/// Widens lows and highs [channels] by tokens [first, end). Returns the lanes that met a value that is not finite.
template <int kWidth, typename T>
inline Mask widen_extremes(const Tile<T>& tile, std::int64_t first, std::int64_t end, float* lows, float* highs) {
  Mask bad = mask_from_bits(0);
  for (std::int64_t block = first; block < end; block += kRows) {
    const std::int64_t block_end = block + kRows < end ? block + kRows : end;
    for (std::int64_t c = 0; c < tile.channels; c += kWidth * kLanes) {
      F32 low[kWidth];
      F32 high[kWidth];
      for (int v = 0; v < kWidth; ++v) {
        low[v] = load(lows + c + v * kLanes);
        high[v] = load(highs + c + v * kLanes);
      }
      const T* row = tile.x + block * tile.x_stride + c;
      for (std::int64_t t = block; t < block_end; ++t, row += tile.x_stride) {
        for (int v = 0; v < kWidth; ++v) {
          const F32 value = load(row + v * kLanes);
          low[v] = min(value, low[v]);
          high[v] = max(value, high[v]);
          bad = either(bad, is_nonfinite(value));
        }
      }
      for (int v = 0; v < kWidth; ++v) {
        store(lows + c + v * kLanes, low[v]);
        store(highs + c + v * kLanes, high[v]);
      }
    }
  }
  return bad;
}

/// Sweep 1: extremes of `runs` runs of tokens, [runs][channels] each; the last run takes what remains. Returns false
/// when a value is not finite.
template <int kWidth, typename T>
inline bool find_extremes(const Tile<T>& tile, std::int64_t runs, float* lows, float* highs) {
  const std::int64_t run = tile.tokens / runs;
  Mask bad = mask_from_bits(0);
  for (std::int64_t r = 0; r < runs; ++r) {
    float* low = lows + r * tile.channels;
    float* high = highs + r * tile.channels;
    for (std::int64_t c = 0; c < tile.channels; ++c) {
      low[c] = std::numeric_limits<float>::infinity();
      high[c] = -std::numeric_limits<float>::infinity();
    }
    const std::int64_t end = r + 1 == runs ? tile.tokens : (r + 1) * run;
    bad = either(bad, widen_extremes<kWidth>(tile, r * run, end, low, high));
  }
  return bits(bad) == 0;
}

/// Appends the elements of one register that `lanes` marks to their channels' lists.
template <typename T>
inline void append(const T* source, std::uint32_t lanes, float* lists, std::int64_t* counts, std::int64_t capacity) {
  while (lanes != 0) {
    const int lane = std::countr_zero(lanes);
    lanes &= lanes - 1u;
    const std::int64_t place = counts[lane]++;
    if (place < capacity) lists[lane * capacity + place] = to_float(source[lane]);
  }
}

/// Sweep 2: collects each channel's elements at or beyond its pivots. A full list goes on counting.
template <int kWidth, typename T>
inline void collect_tails(const Tile<T>& tile, const float* top_pivots, const float* bottom_pivots, float* tops,
                          float* bottoms, std::int64_t* num_top, std::int64_t* num_bottom, std::int64_t capacity) {
  for (std::int64_t block = 0; block < tile.tokens; block += kRows) {
    const std::int64_t block_end = block + kRows < tile.tokens ? block + kRows : tile.tokens;
    for (std::int64_t c = 0; c < tile.channels; c += kLanes) {
      const F32 top = load(top_pivots + c);
      const F32 bottom = load(bottom_pivots + c);
      const T* row = tile.x + block * tile.x_stride + c;
      for (std::int64_t t = block; t < block_end; ++t, row += tile.x_stride) {
        const F32 value = load(row);
        const Mask above = ge(value, top);
        const Mask below = le(value, bottom);
        if (bits(either(above, below)) == 0) continue;
        append(row, bits(above), tops + c * capacity, num_top + c, capacity);
        append(row, bits(below), bottoms + c * capacity, num_bottom + c, capacity);
      }
    }
  }
}

/// Thresholds and dense range of one channel whose lists do not decide it.
template <typename T>
inline OutlierSplit split_channel(const Tile<T>& tile, std::int64_t channel, const OutlierPlan& plan) {
  std::vector<float> values(static_cast<std::size_t>(tile.tokens));
  for (std::int64_t t = 0; t < tile.tokens; ++t) {
    values[static_cast<std::size_t>(t)] = to_float(tile.x[t * tile.x_stride + channel]);
  }
  return split_by_selection(values.data(), tile.tokens, plan);
}

/// Outlier thresholds and dense ranges of a tile's channels. Returns false when a value is not finite.
template <int kWidth, typename T>
inline bool split_tile(const Tile<T>& tile, const OutlierPlan& plan, OutlierSplit* splits) {
  const std::int64_t channels = tile.channels;
  const std::int64_t top_length = upper_tail_length(plan, tile.tokens);
  const std::int64_t bottom_length = lower_tail_length(plan);
  const std::int64_t longest = top_length > bottom_length ? top_length : bottom_length;
  const bool short_tails = tails_are_short(plan, tile.tokens);
  // Twice as many runs as wanted elements: the pivot is about the median of the runs' extremes, which leaves about 1.4
  // times the wanted number beyond it. Room for 4 times; a channel that drifts more takes the slow way.
  const std::int64_t runs = short_tails ? 2 * longest : 1;
  const std::int64_t capacity = 4 * longest + 32;
  float* lows = thread_scratch(channels * (2 * runs + 2 * capacity + 2) + runs);
  float* highs = lows + channels * runs;
  float* tops = highs + channels * runs;
  float* bottoms = tops + channels * capacity;
  float* top_pivots = bottoms + channels * capacity;
  float* bottom_pivots = top_pivots + channels;
  float* column = bottom_pivots + channels;
  if (!find_extremes<kWidth>(tile, runs, lows, highs)) return false;
  if (!short_tails) {
    for (std::int64_t c = 0; c < channels; ++c) splits[c] = split_channel(tile, c, plan);
    return true;
  }
  for (std::int64_t c = 0; c < channels; ++c) {
    for (std::int64_t r = 0; r < runs; ++r) column[r] = highs[r * channels + c];
    top_pivots[c] = select_largest(column, runs, top_length);
    for (std::int64_t r = 0; r < runs; ++r) column[r] = lows[r * channels + c];
    bottom_pivots[c] = select_smallest(column, runs, bottom_length);
  }
  std::int64_t num_top[kMaxTileChannels] = {};
  std::int64_t num_bottom[kMaxTileChannels] = {};
  collect_tails<kWidth>(tile, top_pivots, bottom_pivots, tops, bottoms, num_top, num_bottom, capacity);
  for (std::int64_t c = 0; c < channels; ++c) {
    const bool fits = num_top[c] <= capacity && num_bottom[c] <= capacity;
    const Tail top{tops + c * capacity, num_top[c]};
    const Tail bottom{bottoms + c * capacity, num_bottom[c]};
    splits[c] = OutlierSplit{};
    if (!fits || !split_from_tails(top, bottom, tile.tokens, plan, splits[c])) {
      splits[c] = split_channel(tile, c, plan);
    }
  }
  return true;
}

/// Sweep 3 for float64, whose exact elements must not go through float32.
template <Outliers kOutliers>
inline void write_tile_elements(const Tile<double>& tile, const TileParams& params, const UniformOptions& options) {
  for (std::int64_t t = 0; t < tile.tokens; ++t) {
    const double* x = tile.x + t * tile.x_stride;
    double* out = tile.out + t * tile.out_stride;
    for (std::int64_t c = 0; c < tile.channels; ++c) {
      const float upper = kOutliers == Outliers::kKept ? params.upper[c] : 0.0f;
      const float lower = kOutliers == Outliers::kKept ? params.lower[c] : 0.0f;
      out[c] = simulate_element<kOutliers>(x[c], UniformGrid{params.qs[c], params.offset[c]}, upper, lower, options);
    }
  }
}

/// Sweep 3: quantises, dequantises and writes a tile, whole rows one after another. Going down a few rows first, as the
/// sweeps before do, is slower here: rows of 4 KiB make every load wait for the store before it, whose address differs
/// in the upper bits only.
template <Outliers kOutliers, Quotient kQuotient, typename T>
inline void write_tile(const Tile<T>& tile, const TileParams& params, const UniformOptions& options) {
  const F32 levels = set1(largest_code(options.bits));
  const Mask keeps = keeps_degenerate(options);
  const T* x = tile.x;
  T* out = tile.out;
  for (std::int64_t t = 0; t < tile.tokens; ++t, x += tile.x_stride, out += tile.out_stride) {
    for (std::int64_t c = 0; c < tile.channels; c += kLanes) {
      const GridLanes grid{load(params.qs + c), load(params.offset + c), load(params.inverse + c)};
      const F32 upper = kOutliers == Outliers::kKept ? load(params.upper + c) : grid.qs;
      const F32 lower = kOutliers == Outliers::kKept ? load(params.lower + c) : grid.qs;
      store(out + c, simulate_lanes<kOutliers, kQuotient>(load(x + c), grid, upper, lower, levels, keeps));
    }
  }
}

/// Turns ranges into grids in place: low becomes qs, high becomes the offset; writes the reciprocals.
inline void make_grids(float* low, float* high, float* inverse, std::int64_t channels, const UniformOptions& options) {
  for (std::int64_t c = 0; c < channels; ++c) {
    const UniformGrid grid = make_grid(low[c], high[c], largest_code(options.bits), options.offset, options.compat);
    low[c] = grid.qs;
    high[c] = grid.offset;
    inverse[c] = grid.qs == 0.0f ? 0.0f : 1.0f / grid.qs;
  }
}

/// Sweep 3 of any type.
template <Outliers kOutliers, typename T>
inline void write(const Tile<T>& tile, const TileParams& params, const UniformOptions& options) {
  if constexpr (std::is_same_v<T, double>) {
    write_tile_elements<kOutliers>(tile, params, options);
  } else {
    bool all_suit = true;
    for (std::int64_t c = 0; c < tile.channels; ++c) all_suit &= suits_reciprocal(params.qs[c], params.offset[c]);
    if (all_suit) {
      write_tile<kOutliers, Quotient::kReciprocal>(tile, params, options);
    } else {
      write_tile<kOutliers, Quotient::kDivision>(tile, params, options);
    }
  }
}

/// All sweeps over one tile. Returns false, and writes nothing, when a value is not finite.
template <Outliers kOutliers, int kWidth, typename T>
bool simulate_tile(const Tile<T>& tile, const UniformOptions& options, UniformCounts& counts) {
  float low[kMaxTileChannels];
  float high[kMaxTileChannels];
  float inverse[kMaxTileChannels];
  float upper[kMaxTileChannels];
  float lower[kMaxTileChannels];
  if constexpr (kOutliers == Outliers::kKept) {
    OutlierSplit splits[kMaxTileChannels];
    const OutlierPlan plan = make_outlier_plan(options.outlier_fraction, tile.tokens);
    if (!split_tile<kWidth>(tile, plan, splits)) return false;
    for (std::int64_t c = 0; c < tile.channels; ++c) {
      low[c] = splits[c].low;
      high[c] = splits[c].high;
      upper[c] = splits[c].upper;
      lower[c] = splits[c].lower;
      counts.outliers += splits[c].outliers;
    }
  } else if (!find_extremes<kWidth>(tile, 1, low, high)) {
    return false;
  }
  make_grids(low, high, inverse, tile.channels, options);
  write<kOutliers>(tile, TileParams{low, high, inverse, upper, lower}, options);
  counts.vectors += tile.channels;
  counts.quantized += tile.channels * tile.tokens;
  return true;
}

/// Rows [first, end) of a tile.
template <typename T>
inline Tile<T> rows_of(const Tile<T>& tile, std::int64_t first, std::int64_t end) {
  Tile<T> rows = tile;
  rows.x += first * tile.x_stride;
  rows.out += first * tile.out_stride;
  rows.tokens = (end < tile.tokens ? end : tile.tokens) - first;
  return rows;
}

/// One long group without outliers: threads share it by tokens, in two steps, so that each reads whole rows in order.
/// By channels, 2048 tokens of 1024 channels took 0.72 ms on two cores, half of it waiting for memory
/// (benches/bench_quantizers.py). Returns how many channels it did; the rest do not fill a register.
template <typename T>
std::int64_t simulate_long_group(const UniformProblem& problem, TokenRange range, UniformCounts& counts,
                                 bool& all_finite) {
  const std::int64_t channels = problem.channels / kLanes * kLanes;
  if (channels == 0 || range.first == range.end) return channels;
  const Tile<T> tile{static_cast<const T*>(problem.x) + range.first * problem.x_token_stride,
                     static_cast<T*>(problem.out) + range.first * problem.out_token_stride,
                     problem.x_token_stride,
                     problem.out_token_stride,
                     range.end - range.first,
                     channels};
  const std::int64_t chunk = (tile.tokens / num_threads() / kRows + 1) * kRows;
  const std::int64_t chunks = (tile.tokens + chunk - 1) / chunk;
  float* lows = thread_scratch((2 * chunks + 1) * channels);
  float* highs = lows + chunks * channels;
  float* inverse = highs + chunks * channels;
  std::atomic<bool> finite{true};
  auto find_ranges = [&](std::int64_t i) {
    const Tile<T> rows = rows_of(tile, i * chunk, (i + 1) * chunk);
    if (!find_extremes<1>(rows, 1, lows + i * channels, highs + i * channels)) finite.store(false);
  };
  parallel_for(chunks, find_ranges);
  all_finite = finite.load();
  if (!all_finite) return channels;
  for (std::int64_t i = 1; i < chunks; ++i) {
    for (std::int64_t c = 0; c < channels; c += kLanes) {
      store(lows + c, min(load(lows + i * channels + c), load(lows + c)));
      store(highs + c, max(load(highs + i * channels + c), load(highs + c)));
    }
  }
  make_grids(lows, highs, inverse, channels, problem.options);
  auto write_rows = [&](std::int64_t i) {
    write<Outliers::kNone>(rows_of(tile, i * chunk, (i + 1) * chunk),
                           TileParams{lows, highs, inverse, nullptr, nullptr}, problem.options);
  };
  parallel_for(chunks, write_rows);
  counts.vectors += channels;
  counts.quantized += channels * tile.tokens;
  return channels;
}

/// Channels [first, end), at most kMaxTileChannels, of one group of tokens: in pairs of registers, then single ones.
/// Returns how many channels it did; the rest do not fill a register. `all_finite` is cleared, and the tile not
/// written, where a value is not finite.
template <Outliers kOutliers, typename T>
std::int64_t simulate_channels(const UniformProblem& problem, TokenRange range, std::int64_t first, std::int64_t end,
                               UniformCounts& counts, bool& all_finite) {
  constexpr int kWidth = 2;
  std::int64_t c = first;
  const auto run_tile = [&]<int kTileWidth>() {
    const std::int64_t channels = (end - c) / (kTileWidth * kLanes) * (kTileWidth * kLanes);
    if (channels == 0) return;
    const Tile<T> tile{static_cast<const T*>(problem.x) + range.first * problem.x_token_stride + c,
                       static_cast<T*>(problem.out) + range.first * problem.out_token_stride + c,
                       problem.x_token_stride,
                       problem.out_token_stride,
                       range.end - range.first,
                       channels};
    all_finite &= simulate_tile<kOutliers, kTileWidth>(tile, problem.options, counts);
    c += channels;
  };
  run_tile.template operator()<kWidth>();
  run_tile.template operator()<1>();
  return c - first;
}

}  // namespace
}  // namespace kvpack::KVPACK_ISA
