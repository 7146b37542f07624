// The kernels of a sampling step and of tiles; see step_kernels.py, which also numbers the columns.
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
        value = __fadd_rn(value, __fmul_rn(row[CHURN], noise[at]));
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
    add_term(updated, any, row[UPDATE_NOISE], noise, at);
    add_term(updated, any, row[UPDATE_PREVIOUS], previous, at);
    x[at] = updated;
    if (row[KEEP] != 0.0f) previous[at] = denoised;
}

extern "C" __global__ void advance_step(unsigned long long count, unsigned int* step) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *step += 1;
}

// A tile's place in an image of planes: tiles are counted row by row, `columns` in a row.
__device__ unsigned long long place_in_image(
    unsigned long long at, unsigned int tile, const unsigned int* tops, const unsigned int* lefts,
    unsigned int columns, unsigned int image_height, unsigned int image_width, unsigned int height,
    unsigned int width) {
    unsigned long long plane = at / ((unsigned long long)height * width);
    unsigned int y = at / width % height, x = at % width;
    unsigned long long row = tops[tile / columns] + y;
    return (plane * image_height + row) * image_width + lefts[tile % columns] + x;
}

extern "C" __global__ void clear(unsigned long long count, float* image) {
    unsigned long long at = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
    if (at < count) image[at] = 0.0f;
}

extern "C" __global__ void take_tile(
    unsigned long long count, const unsigned int* tile, const unsigned int* tops, const unsigned int* lefts,
    const float* image, float* part, unsigned int columns, unsigned int image_height, unsigned int image_width,
    unsigned int height, unsigned int width, unsigned int passes) {
    unsigned long long at = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
    if (at >= count) return;
    float value = image[place_in_image(at, *tile, tops, lefts, columns, image_height, image_width, height, width)];
    for (unsigned int pass = 0; pass < passes; ++pass) part[pass * count + at] = value;
}

extern "C" __global__ void add_tile(
    unsigned long long count, const unsigned int* tile, const unsigned int* tops, const unsigned int* lefts,
    const float* row_weights, const float* column_weights, const float* part, float* image, unsigned int columns,
    unsigned int image_height, unsigned int image_width, unsigned int height, unsigned int width) {
    unsigned long long at = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
    if (at >= count) return;
    unsigned int y = at / width % height, x = at % width;
    float row = row_weights[(unsigned long long)(*tile / columns) * height + y];
    float weight = __fmul_rn(row, column_weights[(unsigned long long)(*tile % columns) * width + x]);
    unsigned long long to = place_in_image(at, *tile, tops, lefts, columns, image_height, image_width, height, width);
    image[to] = __fadd_rn(image[to], __fmul_rn(part[at], weight));
}

extern "C" __global__ void advance_tile(unsigned long long count, unsigned int* tile, unsigned int tiles) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *tile = (*tile + 1) % tiles;
}
