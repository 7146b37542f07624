// The kernels of a sampling step; see step_kernels.py, which also numbers the columns.
// __fmul_rn and __fadd_rn keep the compiler from fusing them: NumPy, the oracle, does not either.

__device__ void add_term(float& sum, bool& any, float weight, const float* term, unsigned long long at) {
    if (weight == 0.0f) return;  // a term without weight may not be there
    float product = __fmul_rn(term[at], weight);
    sum = any ? __fadd_rn(sum, product) : product;
    any = true;
}

extern "C" __global__ void prepare_step(
    unsigned long long count, const float* table, const unsigned int* step, const float* noise, float* x,
    float* network_x, float* timestep, float* control_scale, unsigned int passes, unsigned int rows) {
    unsigned long long at = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
    const float* row = table + (unsigned long long)*step * COLUMNS;
    if (at < rows) timestep[at] = row[TIMESTEP];
    if (at == 0) control_scale[0] = row[CONTROL_SCALE];
    if (at >= count) return;
    float value = x[at];
    if (row[CHURN] != 0.0f) {
        unsigned long long drawn = (unsigned long long)row[DRAW] * count + at;
        value = __fadd_rn(value, __fmul_rn(row[CHURN], noise[drawn]));
        x[at] = value;
    }
    value = __fmul_rn(value, row[INPUT_SCALE]);
    for (unsigned int pass = 0; pass < passes; ++pass) network_x[pass * count + at] = value;
}

extern "C" __global__ void combine_step(
    unsigned long long count, const float* table, const unsigned int* step, const float* pos, const float* neg,
    const float* center, const float* noise, float* x, float* previous) {
    unsigned long long at = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
    if (at >= count) return;
    const float* row = table + (unsigned long long)*step * COLUMNS;
    float denoised = 0.0f, updated = 0.0f;
    bool any = false;
    if (row[KEEP] != 0.0f) {
        add_term(denoised, any, row[DENOISED_X], x, at);
        add_term(denoised, any, row[DENOISED_POS], pos, at);
        add_term(denoised, any, row[DENOISED_NEG], neg, at);
        add_term(denoised, any, row[DENOISED_CENTER], center, at);
    }
    any = false;
    add_term(updated, any, row[UPDATE_X], x, at);
    add_term(updated, any, row[UPDATE_POS], pos, at);
    add_term(updated, any, row[UPDATE_NEG], neg, at);
    add_term(updated, any, row[UPDATE_CENTER], center, at);
    add_term(updated, any, row[UPDATE_NOISE], noise, (unsigned long long)row[DRAW] * count + at);
    add_term(updated, any, row[UPDATE_PREVIOUS], previous, at);
    x[at] = updated;
    if (row[KEEP] != 0.0f) previous[at] = denoised;
}

extern "C" __global__ void advance_step(unsigned long long count, unsigned int* step) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *step += 1;
}
