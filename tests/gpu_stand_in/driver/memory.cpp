// Memory of the device and of the host, pools and copies.

static size_t PAGE = 4096;
// What memory holds that nobody has written: no numbers. Of gigabytes the beginning, which nobody reads in tests either.
static void poison(void* start, size_t size) { memset(start, 0xFF, size < (64u << 20) ? size : (64u << 20)); }

static void* map_block(size_t size, bool pinned, CUmemoryPool pool) {
    size_t rounded = (size + 511) / 512 * 512, mapped = (rounded + PAGE - 1) / PAGE * PAGE + PAGE;
    char* base = (char*)mmap(0, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return nullptr;
    mprotect(base + mapped - PAGE, PAGE, PROT_NONE);
    char* start = base + (mapped - PAGE - rounded);  // what runs over the end is caught
    BLOCKS[(uintptr_t)start] = {size, mapped, pinned, pool};
    return start;
}

static void unmap_block(void* start) {
    auto found = BLOCKS.find((uintptr_t)start);
    Block block = found->second;
    size_t rounded = (block.size + 511) / 512 * 512;
    char* base = (char*)start - (block.mapped - PAGE - rounded);
    BLOCKS.erase(found);
    mprotect(base, block.mapped, PROT_NONE);  // addresses are never used again, so that every use is caught
    madvise(base, block.mapped, MADV_DONTNEED);
}

static Block* block_of(const void* address, uintptr_t* start = nullptr) {
    auto after = BLOCKS.upper_bound((uintptr_t)address);
    if (after == BLOCKS.begin()) return nullptr;
    --after;
    if ((uintptr_t)address >= after->first + (after->second.size ? after->second.size : 1)) return nullptr;
    if (start) *start = after->first;
    return &after->second;
}

static bool inside(const void* address, size_t bytes) {
    uintptr_t start;
    Block* block = block_of(address, &start);
    return block && (uintptr_t)address + bytes <= start + block->size;
}

static bool room(size_t size) { return CONTEXT_BYTES + USED + size <= TOTAL; }

static void trim() {
    if (RESERVED > USED)
        RESERVED = USED > POOL.threshold ? USED : (RESERVED < POOL.threshold ? RESERVED : (size_t)POOL.threshold);
    if (RESERVED < USED) RESERVED = USED;
}

static size_t PEAK;
static void took(size_t size) {
    USED += size;
    if (USED > PEAK) PEAK = USED;
    if (USED > RESERVED) RESERVED = USED;
}

API cuMemGetInfo(size_t* free_bytes, size_t* total) {
    ENTER();
    NEEDS_CONTEXT;
    *total = TOTAL;
    *free_bytes = TOTAL - CONTEXT_BYTES - RESERVED;
    return CUDA_SUCCESS;
}

API cuMemAlloc(CUdeviceptr* pointer, size_t size) {
    ENTER("%zu", size);
    NEEDS_CONTEXT;
    SAFE;
    if (!size) return CUDA_ERROR_INVALID_VALUE;
    if (!room(size)) return CUDA_ERROR_OUT_OF_MEMORY;
    void* made = map_block(size, false, nullptr);
    took(size);
    poison(made, size);
    *pointer = (CUdeviceptr)made;
    return CUDA_SUCCESS;
}

API cuMemFree(CUdeviceptr pointer) {
    ENTER("%llx", pointer);
    NEEDS_CONTEXT;
    SAFE;
    if (!pointer) return CUDA_SUCCESS;
    if (!BLOCKS.count(pointer)) return CUDA_ERROR_INVALID_VALUE;
    drain_all();
    USED -= BLOCKS[pointer].size;
    trim();
    unmap_block((void*)pointer);
    return CUDA_SUCCESS;
}

static CUresult alloc_async(CUdeviceptr* pointer, size_t size, CUstream handle) {
    Stream* stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (!size) return CUDA_ERROR_INVALID_VALUE;
    if (stream->capturing) {
        broken("memory is allocated while the stream captures");
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    if (!room(size)) return CUDA_ERROR_OUT_OF_MEMORY;
    void* made = map_block(size, false, (CUmemoryPool)&POOL);
    took(size);
    POOL.used += size;
    *pointer = (CUdeviceptr)made;
    return push(stream, "alloc", [made, size] { poison(made, size); });
}

API cuMemAllocAsync(CUdeviceptr* pointer, size_t size, CUstream stream) {
    ENTER("%zu on %p", size, stream);
    NEEDS_CONTEXT;
    return alloc_async(pointer, size, stream);
}

API cuMemAllocFromPoolAsync(CUdeviceptr* pointer, size_t size, CUmemoryPool, CUstream stream) {
    ENTER("%zu on %p", size, stream);
    NEEDS_CONTEXT;
    return alloc_async(pointer, size, stream);
}

API cuMemFreeAsync(CUdeviceptr pointer, CUstream handle) {
    ENTER("%llx on %p", pointer, handle);
    if (!BLOCKS.count(pointer)) return CUDA_ERROR_INVALID_VALUE;
    return push(stream_of(handle), "free", [pointer] {
        USED -= BLOCKS[pointer].size;
        POOL.used -= BLOCKS[pointer].size;
        unmap_block((void*)pointer);
    });
}

API cuMemHostAlloc(void** pointer, size_t size, unsigned) {
    ENTER("%zu", size);
    NEEDS_CONTEXT;
    SAFE;
    *pointer = map_block(size, true, nullptr);
    memset(*pointer, 0xFF, size);
    return CUDA_SUCCESS;
}

API cuMemAllocHost(void** pointer, size_t size) {
    ENTER("%zu", size);
    NEEDS_CONTEXT;
    SAFE;
    *pointer = map_block(size, true, nullptr);
    memset(*pointer, 0xFF, size);
    return CUDA_SUCCESS;
}

API cuMemFreeHost(void* pointer) {
    ENTER("%p", pointer);
    SAFE;
    if (!BLOCKS.count((uintptr_t)pointer)) return CUDA_ERROR_INVALID_VALUE;
    unmap_block(pointer);
    return CUDA_SUCCESS;
}

API cuMemHostGetDevicePointer(CUdeviceptr* device, void* host, unsigned) {
    ENTER();
    *device = (CUdeviceptr)host;
    return CUDA_SUCCESS;
}

API cuMemGetAddressRange(CUdeviceptr* base, size_t* size, CUdeviceptr pointer) {
    ENTER();
    uintptr_t start;
    Block* block = block_of((void*)pointer, &start);
    if (!block) return CUDA_ERROR_NOT_FOUND;
    if (base) *base = start;
    if (size) *size = block->size;
    return CUDA_SUCCESS;
}

static CUresult attribute_of(void* data, CUpointer_attribute attribute, CUdeviceptr pointer, bool soft) {
    uintptr_t start = 0;
    Block* block = block_of((void*)pointer, &start);
    switch (attribute) {
        case CU_POINTER_ATTRIBUTE_CONTEXT:
            *(CUcontext*)data = block ? (CUcontext)CONTEXT : nullptr;
            break;
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
            *(unsigned*)data = !block ? 0 : block->pinned ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
            break;
        case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
            *(CUdeviceptr*)data = block ? pointer : 0;
            break;
        case CU_POINTER_ATTRIBUTE_HOST_POINTER:
            *(void**)data = block && block->pinned ? (void*)pointer : nullptr;
            break;
        case CU_POINTER_ATTRIBUTE_IS_MANAGED:
            *(int*)data = 0;
            break;
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
            *(int*)data = block ? 0 : -2;
            break;
        case CU_POINTER_ATTRIBUTE_BUFFER_ID:
            *(unsigned long long*)data = start;
            break;
        case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
            *(CUdeviceptr*)data = start;
            break;
        case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
            *(size_t*)data = block ? block->size : 0;
            break;
        case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
            *(CUmemoryPool*)data = block ? block->pool : nullptr;
            break;
        default:
            note("pointer attribute %d", attribute);
            *(int*)data = 0;
    }
    return block || soft ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

API cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    ENTER("%d %llx", attribute, pointer);
    return attribute_of(data, attribute, pointer, false);
}

API cuPointerGetAttributes(unsigned count, CUpointer_attribute* attributes, void** data, CUdeviceptr pointer) {
    ENTER("%llx", pointer);
    for (unsigned i = 0; i < count; ++i) attribute_of(data[i], attributes[i], pointer, true);
    return CUDA_SUCCESS;
}

API cuDeviceGetDefaultMemPool(CUmemoryPool* pool, CUdevice) {
    ENTER();
    *pool = (CUmemoryPool)&POOL;
    return CUDA_SUCCESS;
}

API cuDeviceGetMemPool(CUmemoryPool* pool, CUdevice) {
    ENTER();
    *pool = (CUmemoryPool)&POOL;
    return CUDA_SUCCESS;
}

API cuMemGetDefaultMemPool(CUmemoryPool* pool, CUmemLocation*, CUmemAllocationType) {
    ENTER();
    *pool = (CUmemoryPool)&POOL;
    return CUDA_SUCCESS;
}

API cuMemGetMemPool(CUmemoryPool* pool, CUmemLocation*, CUmemAllocationType) {
    ENTER();
    *pool = (CUmemoryPool)&POOL;
    return CUDA_SUCCESS;
}

API cuMemPoolSetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void* value) {
    ENTER("%d", attribute);
    if (pool != (CUmemoryPool)&POOL) return CUDA_ERROR_INVALID_VALUE;
    if (attribute == CU_MEMPOOL_ATTR_RELEASE_THRESHOLD) {
        POOL.threshold = *(cuuint64_t*)value;
        note("threshold %llu", (unsigned long long)POOL.threshold);
    } else if (attribute < 16)
        POOL.i[attribute] = *(int*)value;
    return CUDA_SUCCESS;
}

API cuMemPoolGetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void* value) {
    ENTER("%d", attribute);
    if (pool != (CUmemoryPool)&POOL) return CUDA_ERROR_INVALID_VALUE;
    if (attribute == CU_MEMPOOL_ATTR_RELEASE_THRESHOLD)
        *(cuuint64_t*)value = POOL.threshold;
    else if (attribute >= CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)
        *(cuuint64_t*)value = POOL.used;
    else
        *(int*)value = 1;
    return CUDA_SUCCESS;
}

API cuMemPoolTrimTo(CUmemoryPool, size_t) {
    ENTER();
    return CUDA_SUCCESS;
}

API cuMemPoolCreate(CUmemoryPool* pool, const CUmemPoolProps*) {
    ENTER();
    *pool = (CUmemoryPool)&POOL;
    return CUDA_SUCCESS;
}

API cuMemPoolDestroy(CUmemoryPool) {
    ENTER();
    return CUDA_SUCCESS;
}

API cuMemPoolGetAccess(CUmemAccess_flags* flags, CUmemoryPool, CUmemLocation*) {
    ENTER();
    *flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    return CUDA_SUCCESS;
}

API cuMemPoolSetAccess(CUmemoryPool, const CUmemAccessDesc*, size_t) {
    ENTER();
    return CUDA_SUCCESS;
}

static CUresult copy(const char* name, void* to, const void* from, size_t bytes, CUstream handle) {
    Stream* stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    bool known_to = inside(to, bytes), known_from = inside(from, bytes);
    if ((block_of(to) && !known_to) || (block_of(from) && !known_from)) {
        broken("a copy of %zu bytes runs over its memory", bytes);
        return CUDA_ERROR_INVALID_VALUE;
    }
    if ((!known_to || !known_from) && !stream->capturing) {  // pageable memory
        broken("a copy of %zu bytes from or to pageable memory, which waits", bytes);
        if (known_to) {
            std::vector<char> kept((const char*)from, (const char*)from + bytes);
            return push(stream, name, [=] { memcpy(to, kept.data(), bytes); });
        }
        drain(stream);
        memcpy(to, from, bytes);
        return CUDA_SUCCESS;
    }
    return push(stream, name, [=] { memcpy(to, from, bytes); });
}

API cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER("%llx <- %llx %zu on %p", to, from, bytes, stream);
    NEEDS_CONTEXT;
    return copy("copy", (void*)to, (void*)from, bytes, stream);
}

API cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    ENTER("%zu", bytes);
    return copy("upload", (void*)to, from, bytes, stream);
}

API cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER("%zu", bytes);
    return copy("download", to, (void*)from, bytes, stream);
}

API cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER("%zu", bytes);
    return copy("copy", (void*)to, (void*)from, bytes, stream);
}

API cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    ENTER();
    SAFE;
    CUresult r = copy("copy", (void*)to, (void*)from, bytes, 0);
    drain(LEGACY);
    return r;
}

API cuMemcpyHtoD(CUdeviceptr to, const void* from, size_t bytes) {
    ENTER();
    SAFE;
    CUresult r = copy("upload", (void*)to, from, bytes, 0);
    drain(LEGACY);
    return r;
}

API cuMemcpyDtoH(void* to, CUdeviceptr from, size_t bytes) {
    ENTER();
    SAFE;
    CUresult r = copy("download", to, (void*)from, bytes, 0);
    drain(LEGACY);
    return r;
}

API cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
    ENTER();
    return push(stream_of(stream), "memset", [=] { memset((void*)to, value, count); });
}

API cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
    ENTER();
    return push(stream_of(stream), "memset", [=] {
        for (size_t i = 0; i < count; ++i) ((unsigned*)to)[i] = value;
    });
}
