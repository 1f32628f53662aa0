// Adds up blocks of paged memory as `kvconnect.sums` defines it: sum(mix(word[i] ^ (i + 1) * GOLDEN)),
// where i is the word's place in the canonical stream. Additions modulo 2**64 may come in any order,
// so that each CTA takes a run of tiles, as in copy.cu, and adds its part to the total once.
//
// `to` of a tile is its place in the stream. Addresses, sizes and places are multiples of 16.

struct Side { unsigned long long address, stride, spread; };
struct Tile { Side from, to; unsigned long long nbytes, reserved; };
struct Pair { int from, to; };

__device__ __forceinline__ unsigned long long mix(unsigned long long word, unsigned long long place)
{
    unsigned long long x = word ^ ((place + 1) * 0x9E3779B97F4A7C15ull);
    x = (x ^ x >> 33) * 0xFF51AFD7ED558CCDull;
    x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53ull;
    return x ^ x >> 33;
}

extern "C" __global__ void add_up(
    const Tile *tiles, const Pair *pairs, unsigned long long start, unsigned long long *total, int num_tiles, int count)
{
    const long long items = (long long)num_tiles * count;
    const long long end = items * (blockIdx.x + 1) / gridDim.x;
    unsigned long long sum = 0;
    for (long long t = items * blockIdx.x / gridDim.x; t < end; t++) {
        const Tile tile = tiles[t % num_tiles];
        const Pair pair = pairs[t / num_tiles];
        const ulonglong2 *words = reinterpret_cast<const ulonglong2 *>(tile.from.address + pair.from * tile.from.stride);
        const unsigned long long place =
            (start + tile.to.address + pair.to * tile.to.stride + count * tile.to.spread) / 8;
        const unsigned long long pairs_of_words = tile.nbytes / 16;
#pragma unroll 4
        for (unsigned long long i = threadIdx.x; i < pairs_of_words; i += blockDim.x) {
            const ulonglong2 held = words[i];
            sum += mix(held.x, place + 2 * i) + mix(held.y, place + 2 * i + 1);
        }
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_down_sync(~0u, sum, lanes);
    if (threadIdx.x % 32 == 0) atomicAdd(total, sum);
}
