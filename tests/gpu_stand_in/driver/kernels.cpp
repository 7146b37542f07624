// Kernels: cubins are looked into for their names; what runs is compiled for the host.

static Library* load(const void* image) {
    if (memcmp(image, "\177ELF", 4)) {
        fprintf(stderr, "stand-in: an image that is no cubin\n");
        return nullptr;
    }
    const unsigned char* elf = (const unsigned char*)image;
    uint64_t sections = *(uint64_t*)(elf + 0x28);
    unsigned size = *(uint16_t*)(elf + 0x3A), count = *(uint16_t*)(elf + 0x3C);
    Library* made = new Library;
    made->image.assign((const char*)image, sections + (size_t)size * count);
    uint64_t programs = *(uint64_t*)(elf + 0x20);
    unsigned psize = *(uint16_t*)(elf + 0x36), pcount = *(uint16_t*)(elf + 0x38);
    size_t end = programs + (size_t)psize * pcount;
    if (end > made->image.size()) made->image.assign((const char*)image, end);
    return made;
}

static CUresult find(Library* library, const char* name, Kernel** found) {
    if (library->kernels.count(name)) {
        *found = library->kernels[name];
        return CUDA_SUCCESS;
    }
    if (library->image.find(std::string(".text.") + name) == std::string::npos) return CUDA_ERROR_NOT_FOUND;
    if (!KERNELS) {
        fprintf(stderr, "stand-in: CUDA_STANDIN_KERNELS is not set\n");
        return CUDA_ERROR_NOT_FOUND;
    }
    Kernel* made = new Kernel;
    made->name = name;
    made->library = library;
    *(void**)&made->run = dlsym(KERNELS, ("run_" + made->name).c_str());
    const int* sizes = (const int*)dlsym(KERNELS, ("args_" + made->name).c_str());
    if (!made->run || !sizes) return CUDA_ERROR_NOT_FOUND;
    while (*sizes) made->sizes.push_back(*sizes++);
    library->kernels[name] = *found = made;
    return CUDA_SUCCESS;
}

API cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option*, void**, unsigned, CUlibraryOption*, void**,
                      unsigned) {
    ENTER();
    SAFE;
    if (DRIVER / 1000 < CUDA_VERSION / 1000) return CUDA_ERROR_INVALID_IMAGE;  // compiled for a newer driver
    Library* made = load(code);
    if (!made) return CUDA_ERROR_INVALID_IMAGE;
    *library = (CUlibrary)made;
    return CUDA_SUCCESS;
}

API cuLibraryUnload(CUlibrary) {
    ENTER();
    return CUDA_SUCCESS;
}

API cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
    ENTER("%s", name);
    return find((Library*)library, name, (Kernel**)kernel);
}

API cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
    ENTER();
    *function = (CUfunction)kernel;
    return CUDA_SUCCESS;
}

API cuKernelGetAttribute(int* value, CUfunction_attribute attribute, CUkernel, CUdevice) {
    ENTER();
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

API cuKernelGetLibrary(CUlibrary* library, CUkernel kernel) {
    ENTER();
    *library = (CUlibrary)((Kernel*)kernel)->library;
    return CUDA_SUCCESS;
}

API cuModuleLoadData(CUmodule* module, const void* image) {
    ENTER();
    SAFE;
    Library* made = load(image);
    if (!made) return CUDA_ERROR_INVALID_IMAGE;
    *module = (CUmodule)made;
    return CUDA_SUCCESS;
}

API cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
    return cuModuleLoadData(module, image);
}

API cuModuleUnload(CUmodule) {
    ENTER();
    return CUDA_SUCCESS;
}

API cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    ENTER("%s", name);
    return find((Library*)module, name, (Kernel**)function);
}

static CUresult launch(Kernel* kernel, unsigned long long blocks, unsigned threads, CUstream stream, void** params) {
    if (!blocks || !threads || threads > 1024) return CUDA_ERROR_INVALID_VALUE;
    auto kept = std::make_shared<std::vector<uint64_t>>();
    for (size_t i = 0; i < kernel->sizes.size(); ++i) {
        uint64_t value = 0;
        memcpy(&value, params[i], kernel->sizes[i]);
        kept->push_back(value);
    }
    return push(stream_of(stream), kernel->name.c_str(), [=] {
        std::vector<void*> pointers;
        for (auto& value : *kept) pointers.push_back(&value);
        kernel->run(blocks, threads, pointers.data());
    });
}

API cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned,
                   CUstream stream, void** params, void**) {
    ENTER("%s grid %u block %u on %p", ((Kernel*)f)->name.c_str(), gx, bx, stream);
    NEEDS_CONTEXT;
    return launch((Kernel*)f, (unsigned long long)gx * gy * gz, bx * by * bz, stream, params);
}

API cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** params, void** extra) {
    ENTER("%s grid %u block %u on %p", ((Kernel*)f)->name.c_str(), c->gridDimX, c->blockDimX, c->hStream);
    NEEDS_CONTEXT;
    if (extra) return CUDA_ERROR_NOT_SUPPORTED;
    return launch((Kernel*)f, (unsigned long long)c->gridDimX * c->gridDimY * c->gridDimZ,
                  c->blockDimX * c->blockDimY * c->blockDimZ, c->hStream, params);
}
