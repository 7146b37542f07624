"""Where two ways of computing one graph part: layer by layer, on a real restoration's inputs.

It is a client of the engine (the inputs come from a restoration by the engine's own runners) and of export (a graph in
another precision is the trace that a build would take), and needs `onnx`, so it lives beside the benchmarks: the engine
must not import `onnx`, and export must not import the engine's pipeline.

    command      options, checks before the work, the table
    capture      a graph's inputs in a restoration
    graphs       a bundle's graph as layers, in a precision
    matching     which layer of one graph is which of another
    slices       a few layers as an ONNX model of their own
    ways         what runs a slice, as a Polygraphy runner
    layerwise    the comparison, a group of layers at a time
    findings     what is measured of a layer, and what is beyond the bounds
    page         the HTML page
"""
