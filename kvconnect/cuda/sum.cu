// Adds up blocks of paged memory as `kvconnect.sums` defines it: sum(mix(word[i] ^ (i + 1) * GOLDEN)),
// where i is the word's place in the canonical stream. Additions modulo 2**64 may come in any order:
// each CTA takes a run of items, as in copy.cu, and each of its warps writes one part of the sum, which
// the host adds up. There is at least one item for every CTA.
//
// `to` of a tile is its place in the stream. Addresses, sizes and places are multiples of 16.

struct Side { unsigned long long address, stride, spread; };
struct Tile { Side from, to; unsigned long long nbytes, reserved; };

__device__ __forceinline__ unsigned long long mix(unsigned long long word, unsigned long long place)
{
    unsigned long long x = word ^ ((place + 1) * 0x9E3779B97F4A7C15ull);
    x = (x ^ x >> 33) * 0xFF51AFD7ED558CCDull;
    x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53ull;
    return x ^ x >> 33;
}

extern "C" __global__ void add_up(
    const Tile *tiles, const int *ids, unsigned long long start, unsigned long long *parts, int num_tiles, int count)
{
    const long long items = (long long)num_tiles * count;
    const long long end = items * (blockIdx.x + 1) / gridDim.x;
    long long t = items * blockIdx.x / gridDim.x;
    unsigned long long sum = 0;
    // Each item is looked up while the one before it is added: the ids are in the host's memory.
    Tile next = tiles[t % num_tiles];
    int next_id = ids[t / num_tiles];
    for (; t < end; t++) {
        const Tile tile = next;
        const ulonglong2 *words = reinterpret_cast<const ulonglong2 *>(tile.from.address + next_id * tile.from.stride);
        if (t + 1 < end) {
            next = tiles[(t + 1) % num_tiles];
            next_id = ids[(t + 1) / num_tiles];
        }
        const unsigned long long place =
            (start + tile.to.address + t / num_tiles * tile.to.stride + count * tile.to.spread) / 8;
        const unsigned long long pairs_of_words = tile.nbytes / 16;
#pragma unroll 4
        for (unsigned long long i = threadIdx.x; i < pairs_of_words; i += blockDim.x) {
            const ulonglong2 held = words[i];
            sum += mix(held.x, place + 2 * i) + mix(held.y, place + 2 * i + 1);
        }
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_down_sync(~0u, sum, lanes);
    if (threadIdx.x % 32 == 0) parts[(blockIdx.x * blockDim.x + threadIdx.x) / 32] = sum;
}
