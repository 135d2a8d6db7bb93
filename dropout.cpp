// Dropout in one pass over the memory. Whether an element stays is a hash of a seed and of its place: the backward pass
// computes it again and nothing is kept, and threads may draw in any order (counter-based random numbers; Salmon et al.
// 2011). A block's key comes from splitmix64 (Steele et al. 2014), an element's bits from lowbias32 (Wellons 2018), with half
// of the key added to its input and half put between its two rounds, which is of our making: see the tests.
#include <algorithm>
#include <cstdint>

constexpr int64_t BLOCK = 4096;                              // elements that share a key

inline uint64_t splitmix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

inline uint32_t random_bits(uint32_t x, uint32_t key) {
    x = (x ^ (x >> 16)) * 0x7feb352d;
    x = (x ^ (x >> 15) ^ key) * 0x846ca68b;
    return x ^ (x >> 16);
}

// y = x * scale where 32 random bits are >= threshold and gate, unless it is null, is above 0 or NaN; else 0. y may be x.
template <typename T>
void drop(const T *x, const T *gate, T *y, int64_t n, uint64_t seed, uint32_t threshold, T scale) {
#pragma omp parallel for if (n > 8 * BLOCK)
    for (int64_t start = 0; start < n; start += BLOCK) {
        const uint64_t key = splitmix(seed + uint64_t(start / BLOCK) * 0x9e3779b97f4a7c15);
        const uint32_t low = key, high = key >> 32, size = std::min(BLOCK, n - start);
        const T *in = x + start, *open = gate ? gate + start : nullptr;
        T *out = y + start;
        if (gate) {
#pragma omp simd
            for (uint32_t i = 0; i < size; i++)
                out[i] = (random_bits(low + i, high) >= threshold) & !(open[i] <= 0) ? in[i] * scale : T(0);
        } else {
#pragma omp simd
            for (uint32_t i = 0; i < size; i++) out[i] = random_bits(low + i, high) >= threshold ? in[i] * scale : T(0);
        }
    }
}

extern "C" void drop_float32(const float *x, const float *gate, float *y, int64_t n, uint64_t seed, uint32_t threshold,
                             double scale) {
    drop(x, gate, y, n, seed, threshold, float(scale));
}
extern "C" void drop_float64(const double *x, const double *gate, double *y, int64_t n, uint64_t seed, uint32_t threshold,
                             double scale) {
    drop(x, gate, y, n, seed, threshold, scale);
}
