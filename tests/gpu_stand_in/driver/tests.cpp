// What tests set and ask.

EXPORTED void standin_order(const char* name, unsigned seed) {
    std::lock_guard<std::recursive_mutex> guard(LOCK);
    ORDER = !strcmp(name, "eager") ? 1 : !strcmp(name, "random") ? 2 : 0;
    RANDOM.seed(seed);
}

// The device that programs find: bytes of memory, name, compute capability and the newest CUDA of its driver.
EXPORTED void standin_device(size_t bytes, const char* name, int major, int minor, int driver) {
    std::lock_guard<std::recursive_mutex> guard(LOCK);
    TOTAL = bytes;
    NAME = name;
    MAJOR = major;
    MINOR = minor;
    DRIVER = driver;
}

// Tell how often each function was called, and count from 0.
EXPORTED void standin_counts(void (*tell)(const char*, long)) {
    std::lock_guard<std::recursive_mutex> guard(LOCK);
    for (auto& counted : COUNTS) tell(counted.first.c_str(), counted.second);
    COUNTS.clear();
}

// Tell what has broken a rule since the last time.
EXPORTED void standin_broken(void (*tell)(const char*)) {
    std::lock_guard<std::recursive_mutex> guard(LOCK);
    for (auto& text : BROKEN) tell(text.c_str());
    BROKEN.clear();
}

// Tell what was made and is still there.
EXPORTED void standin_alive(void (*tell)(const char*, long)) {
    std::lock_guard<std::recursive_mutex> guard(LOCK);
    long pinned = 0;
    for (auto& block : BLOCKS) pinned += block.second.pinned;
    tell("events", EVENTS.size());
    tell("streams", STREAMS.size() - (LEGACY != nullptr));  // without the default one
    tell("device blocks", BLOCKS.size() - pinned);
    tell("pinned blocks", pinned);
    tell("device bytes", USED);
    tell("graphs", GRAPHS.size());
    tell("recordings", EXECS.size());
}

// The most device memory in use since the last time.
EXPORTED size_t standin_peak() {
    std::lock_guard<std::recursive_mutex> guard(LOCK);
    size_t found = PEAK;
    PEAK = USED;
    return found;
}

EXPORTED int standin_capturing(CUstream handle) {
    std::lock_guard<std::recursive_mutex> guard(LOCK);
    Stream* stream = stream_of(handle);
    return stream && stream->capturing;
}

// Let the nth call of a function from now on return an error; return how many calls are missing to the last one asked
// for. A sticky error stays: every later call returns it as well, but for those that give something back.
EXPORTED long standin_fail(const char* name, long nth, int error, int sticky) {
    std::lock_guard<std::recursive_mutex> guard(LOCK);
    long left = FAIL_AT;
    STICKY = sticky;
    LOST = false;
    FAIL = name;
    FAIL_AT = nth;
    INJECTED = (CUresult)error;
    return left;
}
