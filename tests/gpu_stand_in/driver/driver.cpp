// A stand-in for NVIDIA's driver: CUDA's documented driver API on host memory, without a GPU.
//
// Streams are queues. When their work is done is the order's choice (`standin_order`):
//   lazy    as late as the API allows: only what somebody waits for, which finds missing waits; the default
//   eager   at once
//   random  some of it at every call, from any stream
// Device memory begins as NaN, in its stream's order, and is unmapped for good when it is given back, so that every
// later use ends the process. What breaks a rule of the API's documentation is kept for the tests (`standin_broken`).
// Kernels are the real ones, compiled for the host: CUDA_STANDIN_KERNELS names a library with run_NAME and args_NAME.
// CUDA_STANDIN_LOG names a file for every call.
#include <cuda.h>
#include <condition_variable>
#include <thread>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cstdint>
#include <cstdarg>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <vector>
#include <dlfcn.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include "tables.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))
#define API EXPORTED CUresult
typedef std::shared_ptr<struct Point> PointRef;
typedef std::function<void()> Work;

static std::recursive_mutex LOCK;
static FILE* LOG;
static int ORDER;  // 0 lazy, 1 eager, 2 random
static std::mt19937 RANDOM;
static size_t TOTAL = 24ull << 30, USED, CONTEXT_BYTES = 300ull << 20, RESERVED;
static void* KERNELS;
static int MAJOR = 8, MINOR = 9, DRIVER = CUDA_VERSION;
static std::string NAME = "Stand-in RTX 4090";
static bool READY;

static double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}

static void note(const char* format, ...) {
    if (!LOG) return;
    va_list arguments;
    va_start(arguments, format);
    vfprintf(LOG, format, arguments);
    va_end(arguments);
    fputc('\n', LOG);
    fflush(LOG);
}

// What broke a rule that the documentation states, for the tests to ask.
static std::vector<std::string> BROKEN;
static void broken(const char* format, ...) {
    char text[300];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    BROKEN.push_back(text);
    note("!! %s", text);
}

static std::map<std::string, long> COUNTS;
#define ENTER(...)                                     \
    std::lock_guard<std::recursive_mutex> guard(LOCK); \
    setup();                                           \
    ++COUNTS[__func__];                                \
    if (LOG) {                                         \
        fprintf(LOG, "%s ", __func__);                 \
        note(" " __VA_ARGS__);                         \
    }                                                  \
    if (injected(__func__)) return INJECTED;           \
    some_progress();

static std::string FAIL;
static long FAIL_AT;
static CUresult INJECTED;
static bool STICKY, LOST;  // whether every later call fails, too, and whether it has come to that
static void lose_work();
static bool injected(const char* name) {
    if (FAIL_AT > 0 && FAIL == name && --FAIL_AT == 0) {
        LOST = STICKY;
        if (LOST) lose_work();
        return true;
    }
    // What gives something back goes on, as far as the stand-in is concerned, so that leaks show; and what asks for
    // the context or about memory.
    for (const char* part : {"Free", "Destroy", "Release", "GetError", "cuCtx", "cuDevice", "cuPointer"})
        if (strstr(name, part)) return false;
    return LOST;
}
struct Point {
    bool done = false;
    double at = 0;
    struct Stream* stream = nullptr;
};
typedef std::vector<std::shared_ptr<struct UserObject>> Owned;
struct Graph {
    std::vector<Work> nodes;
    Owned owned;  // one entry for each reference
};
struct Exec {
    std::shared_ptr<std::vector<Work>> nodes;
    Owned owned;
};
struct Event {
    unsigned flags;
    PointRef point;
    bool captured = false;
};
struct Op {
    Work work;
    PointRef wait, mark;
    const char* name;
};
struct Stream {
    std::deque<Op> queue;
    unsigned flags = 0;
    int priority = 0;
    unsigned long long id = 0;
    Graph* capturing = nullptr;
    bool invalid = false;
    CUstreamCaptureMode mode;
    pthread_t thread;
    bool busy = false;
};
struct Block {
    size_t size, mapped;
    bool pinned;
    CUmemoryPool pool;
};
struct Pool {
    uint64_t threshold = 0;
    uint64_t used = 0, high = 0;
    int i[16] = {0};
};
struct Kernel {
    std::string name;
    void (*run)(unsigned long long, unsigned long long, void**);
    std::vector<int> sizes;
    struct Library* library;
};
struct Library {
    std::string image;
    std::map<std::string, Kernel*> kernels;
};

static std::map<uintptr_t, Block> BLOCKS;
static std::set<Stream*> STREAMS;
static std::set<Event*> EVENTS;
static Stream* LEGACY;
static Pool POOL;
static char CONTEXT[64] = "context";
static int RETAINED;
static thread_local std::vector<CUcontext> STACK;
static unsigned long long IDS = 10;
static std::set<Graph*> GRAPHS;
static std::set<Exec*> EXECS;

static void some_progress();
static void setup() {
    if (READY) return;
    READY = true;
    const char* value;
    if ((value = getenv("CUDA_STANDIN_LOG"))) LOG = fopen(value, "a");
    if ((value = getenv("CUDA_STANDIN_KERNELS"))) {
        KERNELS = dlopen(value, RTLD_NOW | RTLD_LOCAL);
        if (!KERNELS) fprintf(stderr, "stand-in: %s\n", dlerror());
    }
    LEGACY = new Stream;
    LEGACY->id = 1;
    STREAMS.insert(LEGACY);
}

static Stream* stream_of(CUstream handle) {
    if (!handle || handle == (CUstream)1 || handle == (CUstream)2) return LEGACY;
    return STREAMS.count((Stream*)handle) ? (Stream*)handle : nullptr;
}

#include "work.cpp"
#include "memory.cpp"
#include "device.cpp"
#include "streams.cpp"
#include "graphs.cpp"
#include "kernels.cpp"
#include "names.cpp"
#include "tests.cpp"
