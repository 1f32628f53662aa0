// Copies blocks of paged memory, many scattered pieces in one launch.
//
// The pieces of one block are the same for every block but for its id, so the host describes
// them once, as tiles, and a launch names only pairs of block ids. A tile lies at
//     address + id * stride + count * spread
// of its side, where `count` is the number of pairs of this launch: `spread` places layers one
// after the other in a packed buffer (its "ids" are 0, 1, 2, ...) and is 0 in paged memory.
//
// Item t of a launch is tile t % tiles of pair t / tiles; each CTA takes a run of consecutive items.
// Their pairs are few that way: read from the host's memory, as they are, they cost a launch 20 us
// when neighbouring items went to different CTAs.
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
struct Item { Tile tile; Pair pair; };
struct Place { unsigned long long from, to, nbytes; };

// Looks item `t` up; nothing beyond the last one. Until it is used, nobody waits for what it reads.
__device__ __forceinline__ Item fetch(const Job &job, long long t)
{
    Item found = {};
    if (t < (long long)job.num_tiles * job.count) {
        found.tile = job.tiles[t % job.num_tiles];
        found.pair = job.pairs[t / job.num_tiles];
    }
    return found;
}

__device__ __forceinline__ Place place(const Job &job, const Item &item)
{
    const Side &from = item.tile.from, &to = item.tile.to;
    return {job.from_shift + from.address + item.pair.from * from.stride + job.count * from.spread,
            job.to_shift + to.address + item.pair.to * to.stride + job.count * to.spread, item.tile.nbytes};
}

// The first of this CTA's items; those of CTA `cta` end where the next one's begin.
__device__ __forceinline__ long long first_item(const Job &job, unsigned cta)
{
    return (long long)job.num_tiles * job.count * cta / gridDim.x;
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
    const long long end = first_item(job, blockIdx.x + 1);
    Item next = fetch(job, first_item(job, blockIdx.x));
    for (long long t = first_item(job, blockIdx.x); t < end; t++) {
        const Place item = place(job, next);
        next = fetch(job, t + 1);
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

    const long long first = first_item(job, blockIdx.x), mine = first_item(job, blockIdx.x + 1) - first;
    // Each lane looks up one item of 32 ahead of time; the ids may be in host memory.
    Place loads = place(job, fetch(job, first + lane));
    Place stores = loads;
    Item next = {};

    for (long long k = 0; k < mine + LEAD; k++) {
        if (k < mine) {
            const int slot = (int)(k % 32);
            if (slot == 0) {
                if (k > 0) loads = place(job, next);
                if (k + 32 < mine) next = fetch(job, first + k + 32 + lane);
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
