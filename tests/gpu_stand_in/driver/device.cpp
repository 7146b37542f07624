// The device and its context.

API cuInit(unsigned) {
    ENTER();
    return CUDA_SUCCESS;
}

API cuDriverGetVersion(int* version) {
    ENTER();
    *version = DRIVER;
    return CUDA_SUCCESS;
}

// How many devices a process finds; the compute capability of all but the first, such as "75", where it is another.
static int devices() {
    const char* count = getenv("CUDA_STANDIN_DEVICES");
    return count ? atoi(count) : 1;
}

static int other_capability() {
    const char* capability = getenv("CUDA_STANDIN_OTHERS");
    return capability ? atoi(capability) : MAJOR * 10 + MINOR;
}

API cuDeviceGet(CUdevice* device, int index) {
    ENTER();
    if (index >= devices()) return CUDA_ERROR_INVALID_DEVICE;
    *device = index;
    return CUDA_SUCCESS;
}

API cuDeviceGetCount(int* count) {
    ENTER();
    *count = devices();
    return CUDA_SUCCESS;
}

API cuDeviceGetName(char* name, int length, CUdevice) {
    ENTER();
    snprintf(name, length, "%s", NAME.c_str());
    return CUDA_SUCCESS;
}

API cuDeviceGetUuid(CUuuid* uuid, CUdevice) {
    ENTER();
    memset(uuid, 7, sizeof *uuid);
    return CUDA_SUCCESS;
}

API cuDeviceTotalMem(size_t* bytes, CUdevice) {
    ENTER();
    *bytes = TOTAL;
    return CUDA_SUCCESS;
}

API cuDeviceGetPCIBusId(char* text, int length, CUdevice) {
    ENTER();
    snprintf(text, length, "0000:01:00.0");
    return CUDA_SUCCESS;
}

API cuDeviceCanAccessPeer(int* can, CUdevice, CUdevice) {
    ENTER();
    *can = 0;
    return CUDA_SUCCESS;
}

API cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    ENTER("%d", attribute);
    if (device >= devices()) return CUDA_ERROR_INVALID_DEVICE;
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
            *value = device ? other_capability() / 10 : MAJOR;
            break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
            *value = device ? other_capability() % 10 : MINOR;
            break;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
            *value = 1024;
            break;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y:
            *value = 1024;
            break;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z:
            *value = 64;
            break;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
            *value = 2147483647;
            break;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z:
            *value = 65535;
            break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
            *value = 49152;
            break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
            *value = 128;
            break;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
            *value = 32;
            break;
        case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
        case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
        case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
        case CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY:
            *value = 1;
            break;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
            *value = 2520000;
            break;
        case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
            *value = 10501000;
            break;
        case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
            *value = 384;
            break;
        default:
            *value = 0;
    }
    return CUDA_SUCCESS;
}

API cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    ENTER();
    ++RETAINED;
    *context = (CUcontext)(CONTEXT + device);  // a process works on one of them
    return CUDA_SUCCESS;
}

API cuDevicePrimaryCtxRelease(CUdevice) {
    ENTER();
    --RETAINED;
    return CUDA_SUCCESS;
}

API cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
    ENTER();
    *flags = 0;
    *active = RETAINED > 0;
    return CUDA_SUCCESS;
}

API cuCtxSetCurrent(CUcontext context) {
    ENTER("%p", context);
    if (STACK.empty())
        STACK.push_back(context);
    else
        STACK.back() = context;
    return CUDA_SUCCESS;
}

API cuCtxGetCurrent(CUcontext* context) {
    ENTER();
    *context = STACK.empty() ? nullptr : STACK.back();
    return CUDA_SUCCESS;
}

API cuCtxPushCurrent(CUcontext context) {
    ENTER();
    STACK.push_back(context);
    return CUDA_SUCCESS;
}

API cuCtxPopCurrent(CUcontext* context) {
    ENTER();
    NEEDS_CONTEXT;
    if (context) *context = STACK.back();
    STACK.pop_back();
    return CUDA_SUCCESS;
}

API cuCtxGetDevice(CUdevice* device) {
    ENTER();
    NEEDS_CONTEXT;
    *device = (CUdevice)((char*)STACK.back() - CONTEXT);
    return CUDA_SUCCESS;
}

API cuCtxSynchronize() {
    ENTER();
    NEEDS_CONTEXT;
    SAFE;
    drain_all();
    trim();
    return CUDA_SUCCESS;
}

API cuCtxGetFlags(unsigned* flags) {
    ENTER();
    *flags = 0;
    return CUDA_SUCCESS;
}

API cuCtxGetId(CUcontext, unsigned long long* id) {
    ENTER();
    *id = 5;
    return CUDA_SUCCESS;
}

API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    ENTER();
    NEEDS_CONTEXT;
    *least = 0;
    *greatest = -5;
    return CUDA_SUCCESS;
}
