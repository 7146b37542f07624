// Captures, graphs, and what graphs keep alive.

static Graph* new_graph() {
    Graph* made = new Graph;
    GRAPHS.insert(made);
    return made;
}

API cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode mode) {
    ENTER("%p mode %d", handle, mode);
    Stream* stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (stream == LEGACY) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    if (stream->capturing) return CUDA_ERROR_ILLEGAL_STATE;
    stream->capturing = new_graph();
    stream->invalid = false;
    stream->mode = mode;
    stream->thread = pthread_self();
    return CUDA_SUCCESS;
}

API cuStreamBeginCaptureToGraph(CUstream handle, CUgraph graph, const CUgraphNode*, const CUgraphEdgeData*, size_t,
                                CUstreamCaptureMode mode) {
    ENTER("%p mode %d", handle, mode);
    Stream* stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    stream->capturing = (Graph*)graph;
    stream->invalid = false;
    stream->mode = mode;
    stream->thread = pthread_self();
    return CUDA_SUCCESS;
}

API cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    ENTER("%p", handle);
    Stream* stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (!stream->capturing) return CUDA_ERROR_ILLEGAL_STATE;
    if (stream->mode != CU_STREAM_CAPTURE_MODE_RELAXED && !pthread_equal(stream->thread, pthread_self()))
        return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    Graph* made = stream->capturing;
    stream->capturing = nullptr;
    if (stream->invalid) {
        stream->invalid = false;
        if (GRAPHS.erase(made)) delete made;
        if (graph) *graph = nullptr;
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    }
    note("captured %zu nodes", made->nodes.size());
    if (graph) *graph = (CUgraph)made;
    return CUDA_SUCCESS;
}

API cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
    ENTER("%p", handle);
    Stream* stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    *status = !stream->capturing ? CU_STREAM_CAPTURE_STATUS_NONE
              : stream->invalid  ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                 : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    return CUDA_SUCCESS;
}

API cuStreamGetCaptureInfo(CUstream handle, CUstreamCaptureStatus* status, cuuint64_t* id, CUgraph* graph,
                           const CUgraphNode** nodes, const CUgraphEdgeData** edges, size_t* count) {
    ENTER("%p", handle);
    Stream* stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    *status = !stream->capturing ? CU_STREAM_CAPTURE_STATUS_NONE
              : stream->invalid  ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                 : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    if (id) *id = 1;
    if (graph) *graph = (CUgraph)stream->capturing;
    if (nodes) *nodes = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return CUDA_SUCCESS;
}

API cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode*) {
    ENTER();
    return CUDA_SUCCESS;
}

API cuGraphCreate(CUgraph* graph, unsigned) {
    ENTER();
    *graph = (CUgraph)new_graph();
    return CUDA_SUCCESS;
}

API cuGraphDestroy(CUgraph graph) {
    ENTER("%p", graph);
    if (!GRAPHS.erase((Graph*)graph)) return CUDA_ERROR_INVALID_VALUE;
    delete (Graph*)graph;
    return CUDA_SUCCESS;
}

static CUresult instantiate(CUgraphExec* exec, CUgraph graph) {
    if (!GRAPHS.count((Graph*)graph)) return CUDA_ERROR_INVALID_VALUE;
    Exec* made = new Exec{std::make_shared<std::vector<Work>>(((Graph*)graph)->nodes), ((Graph*)graph)->owned};
    EXECS.insert(made);
    *exec = (CUgraphExec)made;
    return CUDA_SUCCESS;
}

API cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph, unsigned long long) {
    ENTER();
    SAFE;
    return instantiate(exec, graph);
}

API cuGraphInstantiateWithParams(CUgraphExec* exec, CUgraph graph, CUDA_GRAPH_INSTANTIATE_PARAMS* params) {
    ENTER();
    params->result_out = CUDA_GRAPH_INSTANTIATE_SUCCESS;
    return instantiate(exec, graph);
}

API cuGraphUpload(CUgraphExec exec, CUstream) {
    ENTER();
    return EXECS.count((Exec*)exec) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

API cuGraphLaunch(CUgraphExec handle, CUstream stream) {
    ENTER("%p on %p", handle, stream);
    Exec* exec = (Exec*)handle;
    if (!EXECS.count(exec)) return CUDA_ERROR_INVALID_VALUE;
    auto nodes = exec->nodes;
    Owned owned = exec->owned;  // until it has run
    return push(stream_of(stream), "graph", [nodes, owned] {
        for (auto& node : *nodes) node();
    });
}

API cuGraphExecDestroy(CUgraphExec exec) {
    ENTER("%p", exec);
    if (!EXECS.erase((Exec*)exec)) return CUDA_ERROR_INVALID_VALUE;
    delete (Exec*)exec;
    return CUDA_SUCCESS;
}

API cuGraphGetNodes(CUgraph graph, CUgraphNode*, size_t* count) {
    ENTER();
    *count = ((Graph*)graph)->nodes.size();
    return CUDA_SUCCESS;
}

// Objects of the caller's that graphs keep. The driver destroys them on a thread of its own: they may want locks that
// are held where a graph is destroyed, such as Python's.
// Never destroyed themselves: the end of a process would wait for the thread that waits for them.
static std::mutex& DESTROYED_LOCK = *new std::mutex;
static std::condition_variable& DESTROYED_CHANGED = *new std::condition_variable;
static std::deque<std::function<void()>>& DESTROYED = *new std::deque<std::function<void()>>;
static void destroy_later(std::function<void()> destroy) {
    static bool started = [] {
        std::thread([] {
            for (;;) {
                std::unique_lock<std::mutex> guard(DESTROYED_LOCK);
                DESTROYED_CHANGED.wait(guard, [] { return !DESTROYED.empty(); });
                auto next = DESTROYED.front();
                DESTROYED.pop_front();
                guard.unlock();
                next();
            }
        }).detach();
        return true;
    }();
    (void)started;
    std::lock_guard<std::mutex> guard(DESTROYED_LOCK);
    DESTROYED.push_back(destroy);
    DESTROYED_CHANGED.notify_one();
}

struct UserObject {
    void* data;
    CUhostFn destroy;
    ~UserObject() {
        auto function = destroy;
        auto argument = data;
        destroy_later([function, argument] { function(argument); });
    }
};

// The caller's own references.
static std::map<UserObject*, Owned> OBJECTS;

API cuUserObjectCreate(CUuserObject* object, void* data, CUhostFn destroy, unsigned references, unsigned) {
    ENTER();
    std::shared_ptr<UserObject> made(new UserObject{data, destroy});
    OBJECTS[made.get()] = Owned(references, made);
    *object = (CUuserObject)made.get();
    return CUDA_SUCCESS;
}

static CUresult give_up(UserObject* object, unsigned count) {
    auto found = OBJECTS.find(object);
    if (found == OBJECTS.end() || found->second.size() < count) return CUDA_ERROR_INVALID_VALUE;
    found->second.resize(found->second.size() - count);
    if (found->second.empty()) OBJECTS.erase(found);
    return CUDA_SUCCESS;
}

API cuUserObjectRetain(CUuserObject object, unsigned count) {
    ENTER();
    auto found = OBJECTS.find((UserObject*)object);
    if (found == OBJECTS.end()) return CUDA_ERROR_INVALID_VALUE;
    found->second.resize(found->second.size() + count, found->second.front());
    return CUDA_SUCCESS;
}

API cuUserObjectRelease(CUuserObject object, unsigned count) {
    ENTER();
    return give_up((UserObject*)object, count);
}

API cuGraphRetainUserObject(CUgraph graph, CUuserObject object, unsigned count, unsigned flags) {
    ENTER();
    auto found = OBJECTS.find((UserObject*)object);
    if (!GRAPHS.count((Graph*)graph) || found == OBJECTS.end()) return CUDA_ERROR_INVALID_VALUE;
    Owned& owned = ((Graph*)graph)->owned;
    owned.resize(owned.size() + count, found->second.front());
    return flags & CU_GRAPH_USER_OBJECT_MOVE ? give_up((UserObject*)object, count) : CUDA_SUCCESS;
}

API cuGraphReleaseUserObject(CUgraph graph, CUuserObject object, unsigned count) {
    ENTER();
    Owned& owned = ((Graph*)graph)->owned;
    for (size_t i = owned.size(); i-- > 0 && count > 0;)
        if (owned[i].get() == (UserObject*)object) owned.erase(owned.begin() + i), --count;
    return CUDA_SUCCESS;
}

API cuGraphGetId(CUgraph, unsigned* id) {
    ENTER();
    *id = 1;
    return CUDA_SUCCESS;
}
