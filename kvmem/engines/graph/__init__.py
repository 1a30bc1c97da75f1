"""The fast engine: a covered model's own weights, run straight down behind a memory that lies in a buffer.

A memory is placed at the head of a preallocated buffer; a query's keys and values, and those of the tokens that follow,
are written behind it. Lengths are data on the device, so one CUDA graph a query length serves every memory.

    weights.py    the model's weights, those of one input side by side; which models are covered
    layer.py      a decoder layer as pure functions
    forward.py    the pass: token ids behind a buffer's first rows -> the next token and its logits
    attention/    one attention kernel, one file
    fused.py      a decoding step in seven launches a layer, where Triton runs
    kernels.py    its Triton kernels
    buffers.py    where keys and values lie, and which memory is in place
    capture.py    the pass as CUDA graphs, and what warming up cost
    engine.py     answers under way: who sits in which buffer
    branches.py   many queries behind one memory, without copies of it
"""
