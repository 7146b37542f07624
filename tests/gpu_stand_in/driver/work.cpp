// When the work of streams is done.

static bool step(Stream* stream);
static void reach(PointRef point) {
    while (!point->done)
        if (!step(point->stream)) {
            fprintf(stderr, "stand-in: a point that cannot be reached\n");
            abort();
        }
}

static bool step(Stream* stream) {
    if (stream->queue.empty() || stream->busy) return false;
    Op op = std::move(stream->queue.front());
    if (op.wait && !op.wait->done) {
        stream->queue.front() = std::move(op);
        PointRef wait = stream->queue.front().wait;
        stream->busy = true;
        reach(wait);
        stream->busy = false;
        return true;
    }
    stream->queue.pop_front();
    stream->busy = true;
    if (op.work) op.work();
    stream->busy = false;
    if (op.mark) {
        op.mark->done = true;
        op.mark->at = now();
    }
    return true;
}

static void drain(Stream* stream) {
    while (step(stream)) {
    }
}

static void drain_all() {
    for (auto* stream : std::set<Stream*>(STREAMS)) drain(stream);
}

// A device that has failed runs nothing any more; memory that was given back in a stream's order is free.
static void lose_work() {
    for (auto* stream : STREAMS)
        for (auto& op : stream->queue)
            if (strcmp(op.name, "free")) op.work = nullptr;
}

static void some_progress() {
    if (ORDER != 2 || STREAMS.empty()) return;
    std::vector<Stream*> all(STREAMS.begin(), STREAMS.end());
    for (int i = RANDOM() % 4; i > 0; --i) {
        Stream* s = all[RANDOM() % all.size()];
        if (!s->busy) step(s);
    }
}

static CUresult push(Stream* stream, const char* name, Work work, PointRef wait = nullptr, PointRef mark = nullptr) {
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capturing) {
        if (stream->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        if (work) {
            stream->capturing->nodes.push_back(work);
        }
        return CUDA_SUCCESS;
    }
    if (mark) mark->stream = stream;
    stream->queue.push_back({std::move(work), wait, mark, name});
    if (ORDER == 1) drain(stream);
    return CUDA_SUCCESS;
}

// Calls that a capture of this thread does not allow (modes global and thread_local).
static CUresult unsafe_call(const char* what) {
    for (auto* stream : STREAMS)
        if (stream->capturing && stream->mode != CU_STREAM_CAPTURE_MODE_RELAXED &&
            (stream->mode == CU_STREAM_CAPTURE_MODE_GLOBAL || pthread_equal(stream->thread, pthread_self()))) {
            stream->invalid = true;
            broken("%s while this thread captures", what);
            return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        }
    return CUDA_SUCCESS;
}

#define SAFE \
    if (CUresult bad = unsafe_call(__func__)) return bad
#define NEEDS_CONTEXT \
    if (STACK.empty() || !STACK.back()) return CUDA_ERROR_INVALID_CONTEXT
