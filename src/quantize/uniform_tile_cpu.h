// Per channel: what is known of a tile before it is written, which is ranges, root mean squares, and outliers. The sweeps are
// drawn in quantize/uniform_per_channel_cpu.h.

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
  std::int64_t first_channel;  // of the matrix
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

/// Turns ranges into grids in place: low becomes qs, high becomes the offset; writes the reciprocals. Calibrated grids do
/// not look at the ranges.
inline void make_grids(float* low, float* high, float* inverse, std::int64_t channels, std::int64_t first_channel,
                       const UniformProblem& problem) {
  for (std::int64_t c = 0; c < channels; ++c) {
    const bool is_static = problem.static_grids != nullptr;
    const VectorGrid& fixed = is_static ? problem.static_grids[first_channel + c] : VectorGrid{};
    const UniformGrid grid =
        is_static ? UniformGrid{fixed.qs, fixed.offset} : make_range_grid(low[c], high[c], problem.options);
    low[c] = grid.qs;
    high[c] = grid.offset;
    inverse[c] = grid.qs == 0.0f ? 0.0f : 1.0f / grid.qs;
  }
}

/// Grids from root mean squares: qs and offset [channels]. One lane owns one channel, so its strands are rows of sums.
template <typename T>
inline void make_rms_grids(const Tile<T>& tile, float* qs, float* offset) {
  float* sums = thread_scratch(kStrands * tile.channels);
  for (std::int64_t i = 0; i < kStrands * tile.channels; ++i) sums[i] = 0.0f;
  for (std::int64_t t = 0; t < tile.tokens; ++t) {
    float* strand = sums + t % kStrands * tile.channels;
    const T* row = tile.x + t * tile.x_stride;
    for (std::int64_t c = 0; c < tile.channels; c += kLanes) {
      const F32 value = load(row + c);
      store(strand + c, add(load(strand + c), mul(value, value)));
    }
  }
  for (std::int64_t c = 0; c < tile.channels; ++c) {
    float strands[kStrands];
    for (std::int64_t s = 0; s < kStrands; ++s) strands[s] = sums[s * tile.channels + c];
    const UniformGrid grid = make_rms_grid(join_strands(strands), tile.tokens);
    qs[c] = grid.qs;
    offset[c] = grid.offset;
  }
}

/// Elements at or beyond calibrated thresholds, [channels] each.
template <typename T>
inline std::int64_t count_tile_outliers(const Tile<T>& tile, const float* upper, const float* lower) {
  std::int64_t outliers = 0;
  for (std::int64_t t = 0; t < tile.tokens; ++t) {
    const T* row = tile.x + t * tile.x_stride;
    for (std::int64_t c = 0; c < tile.channels; c += kLanes) {
      const F32 value = load(row + c);
      outliers += std::popcount(bits(either(ge(value, load(upper + c)), le(value, load(lower + c)))));
    }
  }
  return outliers;
}

}  // namespace
}  // namespace kvpack::KVPACK_ISA
