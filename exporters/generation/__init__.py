"""Text from exported decoders: the steps, what they are checked against, and what other programs need to take them.

check             a decoder's graph beside its model, step by step
genai_config      what onnxruntime-genai reads of a graph
decoder           a graph and its cache, step by step
tokenized_folder  tokens of texts, and back
sampling          the next token, of logits
generate          prompts in, text out
"""
