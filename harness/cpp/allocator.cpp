// harness/allocator.py: the allocator of CPU tensors that keeps freed blocks, but never holds more than was in use at once.
//
// Blocks of LEAST bytes and more are mappings of their own. A freed one is kept; the next request takes it, cuts it, or
// makes it longer (mremap moves its pages, so only the new ones are faulted in). Kept blocks go back to the kernel, the
// oldest first, as soon as they and those in use would be more than was ever in use. So resident memory is the peak of
// live tensors, without the holes of a heap, and a step that does what the last one did faults in nothing.
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

const size_t LEAST = size_t(1) << 20, PAGE = 4096;

struct Block {
    char* data;
    uint64_t freed;  // number of the release: small is long ago
};

class Pool {
  public:
    void* take(size_t num_bytes) {
        const size_t size = (num_bytes + PAGE - 1) / PAGE * PAGE;
        std::lock_guard<std::mutex> guard(mutex);
        char* data = taken(size);
        if (data == nullptr) return nullptr;
        live[data] = size;
        live_bytes += size;
        most_bytes = std::max(most_bytes, live_bytes);
        return data;
    }

    // False for what is no block of this pool.
    bool give(void* data) {
        std::lock_guard<std::mutex> guard(mutex);
        const auto found = live.find(data);
        if (found == live.end()) return false;
        keep(static_cast<char*>(data), found->second);
        live_bytes -= found->second;
        live.erase(found);
        return true;
    }

    // Returns all that is kept; what was ever in use counts from now on.
    void release() {
        std::lock_guard<std::mutex> guard(mutex);
        shrink(0);
        most_bytes = live_bytes;
    }

    void count(int64_t* found) {
        std::lock_guard<std::mutex> guard(mutex);
        found[0] = live_bytes, found[1] = kept_bytes, found[2] = most_bytes;
    }

  private:
    std::mutex mutex;
    std::unordered_map<void*, size_t> live;
    std::multimap<size_t, Block> kept;
    size_t live_bytes = 0, kept_bytes = 0, most_bytes = 0;
    uint64_t num_freed = 0;

    char* taken(size_t size) {
        auto found = kept.lower_bound(size);
        if (found != kept.end()) return cut(found, size);
        if (!kept.empty()) {
            if (char* data = stretched(std::prev(kept.end()), size)) return data;
        }
        make_room(size);
        char* data = mapped(size);
        if (data != nullptr || kept.empty()) return data;
        shrink(0);
        return mapped(size);
    }

    // The smallest kept block that is large enough; the rest of it stays kept.
    char* cut(std::multimap<size_t, Block>::iterator found, size_t size) {
        const auto [whole, block] = *found;
        kept.erase(found);
        kept_bytes -= whole;
        if (whole > size) {
            if (whole - size < LEAST) {
                munmap(block.data + size, whole - size);
            } else {
                kept.emplace(whole - size, Block{block.data + size, block.freed});
                kept_bytes += whole - size;
            }
        }
        return block.data;
    }

    // The largest kept block, with more pages at its end.
    char* stretched(std::multimap<size_t, Block>::iterator found, size_t size) {
        const auto [part, block] = *found;
        kept.erase(found);
        kept_bytes -= part;
        make_room(size);
        void* data = mremap(block.data, part, size, MREMAP_MAYMOVE);
        if (data == MAP_FAILED) {
            munmap(block.data, part);
            return nullptr;
        }
        return static_cast<char*>(data);
    }

    static char* mapped(size_t size) {
        void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        return data == MAP_FAILED ? nullptr : static_cast<char*>(data);
    }

    void keep(char* data, size_t size) {
        kept.emplace(size, Block{data, num_freed++});
        kept_bytes += size;
    }

    void make_room(size_t size) {
        const size_t limit = std::max(most_bytes, live_bytes + size);
        shrink(limit - live_bytes - size);
    }

    // Of the oldest block only as much goes as has to.
    void shrink(size_t limit) {
        while (kept_bytes > limit) {
            const auto older = [](const auto& a, const auto& b) { return a.second.freed < b.second.freed; };
            const auto oldest = std::min_element(kept.begin(), kept.end(), older);
            const auto [size, block] = *oldest;
            const size_t excess = kept_bytes - limit, rest = size > excess + LEAST ? size - excess : 0;
            kept.erase(oldest);
            munmap(block.data + rest, size - rest);
            kept_bytes -= size - rest;
            if (rest > 0) kept.emplace(rest, block);
        }
    }
};

Pool& pool() {
    static Pool* only = new Pool;  // tensors may be freed after static objects are gone
    return *only;
}

void release(void* data) {
    if (data == nullptr) return;
    c10::profiledCPUMemoryReporter().Delete(data);
    const bool may_be_block = reinterpret_cast<uintptr_t>(data) % PAGE == 0;
    if (!(may_be_block && pool().give(data))) c10::free_cpu(data);
}

struct Allocator final : c10::Allocator {
    c10::DataPtr allocate(size_t num_bytes) override {
        void* data = num_bytes < LEAST ? c10::alloc_cpu(num_bytes) : pool().take(num_bytes);
        if (data == nullptr && num_bytes > 0) {
            c10::profiledCPUMemoryReporter().OutOfMemory(num_bytes);
            TORCH_CHECK(false, "can't allocate memory: you tried to allocate ", num_bytes, " bytes");
        }
        c10::profiledCPUMemoryReporter().New(data, num_bytes);
        return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }
};

}  // namespace

extern "C" void allocator_install() {
    static Allocator* only = new Allocator;
    c10::SetCPUAllocator(only, 1);
}

extern "C" void allocator_release() { pool().release(); }

// Bytes in use, kept, and in use at most.
extern "C" void allocator_count(int64_t* found) { pool().count(found); }
