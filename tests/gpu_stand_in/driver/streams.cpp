// Streams and events.

API cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority) {
    ENTER("flags %u", flags);
    NEEDS_CONTEXT;
    Stream* made = new Stream;
    made->flags = flags;
    made->priority = priority;
    made->id = ++IDS;
    STREAMS.insert(made);
    *stream = (CUstream)made;
    return CUDA_SUCCESS;
}

API cuStreamCreate(CUstream* stream, unsigned flags) { return cuStreamCreateWithPriority(stream, flags, 0); }
API cuStreamDestroy(CUstream handle) {
    ENTER("%p", handle);
    Stream* stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    drain(stream);
    STREAMS.erase(stream);
    return CUDA_SUCCESS;
}

API cuStreamSynchronize(CUstream handle) {
    ENTER("%p", handle);
    Stream* stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capturing) {
        stream->invalid = true;
        broken("a stream is waited for while it captures");
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    if (stream == LEGACY) SAFE;
    if (stream == LEGACY) {
        for (auto* s : std::set<Stream*>(STREAMS))
            if (!(s->flags & CU_STREAM_NON_BLOCKING)) drain(s);
    } else
        drain(stream);
    trim();
    return CUDA_SUCCESS;
}

API cuStreamQuery(CUstream handle) {
    ENTER();
    Stream* stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    SAFE;
    return stream->queue.empty() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

API cuStreamGetFlags(CUstream handle, unsigned* flags) {
    ENTER();
    *flags = stream_of(handle)->flags;
    return CUDA_SUCCESS;
}

API cuStreamGetPriority(CUstream handle, int* priority) {
    ENTER();
    *priority = stream_of(handle)->priority;
    return CUDA_SUCCESS;
}

API cuStreamGetId(CUstream handle, unsigned long long* id) {
    ENTER();
    *id = stream_of(handle)->id;
    return CUDA_SUCCESS;
}

API cuStreamGetDevice(CUstream, CUdevice* device) {
    ENTER();
    *device = 0;
    return CUDA_SUCCESS;
}

#undef cuStreamGetCtx
API cuStreamGetCtx(CUstream, CUcontext* context) {
    ENTER();
    *context = (CUcontext)CONTEXT;
    return CUDA_SUCCESS;
}

API cuStreamGetCtx_v2(CUstream, CUcontext* context, CUgreenCtx* green) {
    ENTER();
    *context = (CUcontext)CONTEXT;
    if (green) *green = nullptr;
    return CUDA_SUCCESS;
}

API cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned) {
    ENTER("%p waits for %p", handle, event_handle);
    Stream* stream = stream_of(handle);
    Event* event = (Event*)event_handle;
    if (!stream || !EVENTS.count(event)) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capturing) {
        broken("a stream waits for an event while it captures");
        stream->invalid = true;
        return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    }
    if (!event->point) return CUDA_SUCCESS;
    return push(stream, "wait", nullptr, event->point);
}

API cuEventCreate(CUevent* event, unsigned flags) {
    ENTER("flags %u", flags);
    NEEDS_CONTEXT;
    Event* made = new Event;
    made->flags = flags;
    EVENTS.insert(made);
    *event = (CUevent)made;
    return CUDA_SUCCESS;
}

API cuEventDestroy(CUevent event) {
    ENTER("%p", event);
    if (!EVENTS.erase((Event*)event)) return CUDA_ERROR_INVALID_HANDLE;
    delete (Event*)event;
    return CUDA_SUCCESS;
}

API cuEventRecord(CUevent handle, CUstream stream_handle) {
    ENTER("%p on %p", handle, stream_handle);
    Event* event = (Event*)handle;
    Stream* stream = stream_of(stream_handle);
    if (!stream || !EVENTS.count(event)) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capturing) {
        event->captured = true;
        return CUDA_SUCCESS;
    }
    event->point = std::make_shared<Point>();
    event->captured = false;
    return push(stream, "record", nullptr, nullptr, event->point);
}

API cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned) { return cuEventRecord(event, stream); }
API cuEventQuery(CUevent handle) {
    ENTER("%p", handle);
    Event* event = (Event*)handle;
    if (!EVENTS.count(event)) return CUDA_ERROR_INVALID_HANDLE;
    if (event->captured) return CUDA_ERROR_CAPTURED_EVENT;
    SAFE;
    return !event->point || event->point->done ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

API cuEventSynchronize(CUevent handle) {
    ENTER("%p", handle);
    Event* event = (Event*)handle;
    if (!EVENTS.count(event)) return CUDA_ERROR_INVALID_HANDLE;
    if (event->captured) return CUDA_ERROR_CAPTURED_EVENT;
    SAFE;
    if (event->point) reach(event->point);
    trim();
    return CUDA_SUCCESS;
}

API cuEventElapsedTime(float* ms, CUevent first, CUevent second) {
    ENTER();
    Event *a = (Event*)first, *b = (Event*)second;
    if (!EVENTS.count(a) || !EVENTS.count(b) || (a->flags | b->flags) & CU_EVENT_DISABLE_TIMING)
        return CUDA_ERROR_INVALID_HANDLE;
    if (!a->point || !b->point) return CUDA_ERROR_INVALID_HANDLE;
    if (!a->point->done || !b->point->done) return CUDA_ERROR_NOT_READY;
    *ms = (float)(b->point->at - a->point->at);
    return CUDA_SUCCESS;
}

API cuLaunchHostFunc(CUstream stream, CUhostFn function, void* data) {
    ENTER("on %p", stream);
    return push(stream_of(stream), "host", [=] { function(data); });
}
