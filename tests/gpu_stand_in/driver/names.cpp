// Names of errors, and functions by name.

API cuGetErrorName(CUresult error, const char** name) {
    for (auto& e : ERRORS)
        if (e.code == error) {
            *name = e.name;
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_INVALID_VALUE;
}

API cuGetErrorString(CUresult error, const char** name) { return cuGetErrorName(error, name); }
API cuGetExportTable(const void** table, const CUuuid*) {
    ENTER();
    *table = nullptr;
    return CUDA_ERROR_NOT_SUPPORTED;
}  // undocumented, and not ours to answer
#undef cuGetProcAddress
API cuGetProcAddress_v2(const char* symbol, void** function, int version, cuuint64_t,
                        CUdriverProcAddressQueryResult* status) {
    std::lock_guard<std::recursive_mutex> guard(LOCK);
    setup();
    std::string name = symbol;
    for (int i = 0; NEWEST[i][0]; ++i)
        if (name == NEWEST[i][0]) name = NEWEST[i][1];
    if (!strcmp(symbol, "cuStreamGetCtx")) name = version >= 12050 ? "cuStreamGetCtx_v2" : "cuStreamGetCtx";
    if (!strcmp(symbol, "cuGetProcAddress")) name = "cuGetProcAddress_v2";
    static void* self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    void* found = dlsym(self, name.c_str());
    if (!found) found = dlsym(self, symbol);
    *function = found;
    if (status) *status = found ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    if (!found) note("not there: %s %d", symbol, version);
    return found ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

API cuGetProcAddress(const char* symbol, void** function, int version, cuuint64_t flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, nullptr);
}
