// Copies blocks of paged memory, many scattered pieces in one launch.
//
// The pieces of one block are the same for every block but for its id, so the host describes
// them once, as tiles, and a launch names only pairs of block ids. A tile lies at
//     address + id * stride + count * spread
// of its side, where `count` is the number of pairs of this launch: `spread` places layers one
// after the other in a packed buffer (its "ids" are 0, 1, 2, ...) and is 0 in paged memory.
//
// Item t of a launch is tile t % tiles of pair t / tiles; CTA c takes items c, c + grid, ...
// Addresses may be those of another GPU's memory, mapped into this process.

struct Side { unsigned long long address, stride, spread; };
struct Tile { Side from, to; unsigned long long nbytes, reserved; };
struct Pair { int from, to; };
struct Job {
    const Tile *tiles;
    const Pair *pairs;  // may be host memory
    unsigned long long from_shift, to_shift;
    unsigned *seen;  // bitmap of the multiprocessors that took part, for measurements; or null
    int num_tiles, count;
};
struct Place { unsigned long long from, to, nbytes; };

// Where item `t` goes; nothing beyond the last one.
__device__ __forceinline__ Place place(const Job &job, long long t)
{
    Place found = {0, 0, 0};
    if (t < (long long)job.num_tiles * job.count) {
        const Tile tile = job.tiles[t % job.num_tiles];
        const Pair pair = job.pairs[t / job.num_tiles];
        found.from = job.from_shift + tile.from.address + pair.from * tile.from.stride + job.count * tile.from.spread;
        found.to = job.to_shift + tile.to.address + pair.to * tile.to.stride + job.count * tile.to.spread;
        found.nbytes = tile.nbytes;
    }
    return found;
}

__device__ __forceinline__ void mark(unsigned *seen)
{
    if (seen != nullptr && threadIdx.x == 0) {
        unsigned sm;
        asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
        atomicOr(seen + sm / 32, 1u << (sm % 32));
    }
}

// -- any GPU, any alignment -------------------------------------------------------------------

template <typename Word, int UNROLL>
__device__ __forceinline__ void copy_words(char *to, const char *from, unsigned long long nbytes)
{
    const Word *source = reinterpret_cast<const Word *>(from);
    Word *target = reinterpret_cast<Word *>(to);
    const unsigned long long words = nbytes / sizeof(Word);
    unsigned long long i = threadIdx.x;
    for (; i + (UNROLL - 1) * blockDim.x < words; i += UNROLL * blockDim.x) {
        Word held[UNROLL];
#pragma unroll
        for (int k = 0; k < UNROLL; k++) held[k] = source[i + k * blockDim.x];
#pragma unroll
        for (int k = 0; k < UNROLL; k++) target[i + k * blockDim.x] = held[k];
    }
    for (; i < words; i += blockDim.x) target[i] = source[i];
    const unsigned long long rest = words * sizeof(Word);
    for (unsigned long long b = rest + threadIdx.x; b < nbytes; b += blockDim.x) to[b] = from[b];
}

extern "C" __global__ void copy_by_threads(
    const Tile *tiles, const Pair *pairs, unsigned long long from_shift, unsigned long long to_shift, unsigned *seen,
    int num_tiles, int count)
{
    const Job job = {tiles, pairs, from_shift, to_shift, seen, num_tiles, count};
    mark(job.seen);
    const long long items = (long long)job.num_tiles * job.count;
    for (long long t = blockIdx.x; t < items; t += gridDim.x) {
        const Place item = place(job, t);
        const char *from = reinterpret_cast<const char *>(item.from);
        char *to = reinterpret_cast<char *>(item.to);
        if (((item.from | item.to) & 15) == 0)
            copy_words<uint4, 4>(to, from, item.nbytes);
        else
            copy_words<char, 1>(to, from, item.nbytes);
    }
}

// -- Hopper and later: the bulk copy engine of each multiprocessor ------------------------------
//
// One warp drives a ring of stages in shared memory: a bulk load fills a stage, a bulk store
// empties it, LEAD loads are under way at any time. No data passes through registers, so few
// multiprocessors saturate a link. Addresses and sizes must be multiples of 16.

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ unsigned shared_address(const void *pointer)
{
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void wait_full(unsigned barrier, unsigned parity)
{
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra.uni over;\n"
        "bra.uni again;\n"
        "over:\n"
        "}\n" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ Place of_lane(const Place &held, int lane)
{
    Place found;
    found.from = __shfl_sync(~0u, held.from, lane);
    found.to = __shfl_sync(~0u, held.to, lane);
    found.nbytes = __shfl_sync(~0u, held.nbytes, lane);
    return found;
}

#endif

extern "C" __global__ void __launch_bounds__(32) copy_by_bulk(
    const Tile *tiles, const Pair *pairs, unsigned long long from_shift, unsigned long long to_shift, unsigned *seen,
    int num_tiles, int count)
{
#if __CUDA_ARCH__ >= 900
    const Job job = {tiles, pairs, from_shift, to_shift, seen, num_tiles, count};
    extern __shared__ __align__(128) unsigned char ring[];
    __shared__ __align__(8) unsigned long long full[STAGES];
    const int lane = threadIdx.x;
    mark(job.seen);
    if (lane < STAGES)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(full + lane)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();

    const long long items = (long long)job.num_tiles * job.count;
    const long long mine = items > blockIdx.x ? (items - blockIdx.x - 1) / gridDim.x + 1 : 0;
    // Each lane looks up the place of one item ahead of time; the ids may be in host memory.
    Place loads = place(job, blockIdx.x + (long long)lane * gridDim.x);
    Place stores = loads, next = loads;

    for (long long k = 0; k < mine + LEAD; k++) {
        if (k < mine) {
            const int slot = (int)(k % 32);
            if (slot == 0) {
                if (k > 0) loads = next;
                next = place(job, blockIdx.x + (k + 32 + lane) * gridDim.x);
            }
            const Place item = of_lane(loads, slot);
            if (lane == 0) {
                const int stage = (int)(k % STAGES);
                // The stage's last store must have been read out of shared memory.
                if (k >= STAGES)
                    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(STAGES - 1 - LEAD) : "memory");
                const unsigned barrier = shared_address(full + stage);
                asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"((unsigned)item.nbytes)
                             : "memory");
                asm volatile(
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                        shared_address(ring + stage * TILE)),
                    "l"(item.from), "r"((unsigned)item.nbytes), "r"(barrier)
                    : "memory");
            }
        }
        const long long j = k - LEAD;
        if (j >= 0) {
            const int slot = (int)(j % 32);
            if (slot == 0) stores = loads;  // still the same 32 items, for LEAD < 32
            const Place item = of_lane(stores, slot);
            if (lane == 0) {
                const int stage = (int)(j % STAGES);
                wait_full(shared_address(full + stage), (unsigned)(j / STAGES) & 1);
                asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(item.to),
                             "r"(shared_address(ring + stage * TILE)), "r"((unsigned)item.nbytes)
                             : "memory");
                asm volatile("cp.async.bulk.commit_group;" ::: "memory");
            }
        }
    }
    if (lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}
