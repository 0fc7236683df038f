"""Generates text with exported decoders, checks their steps, and describes them for other programs.

check             compares a decoder's graph with its model, step by step
genai_config      writes the configuration that onnxruntime-genai reads
decoder           runs a graph with its cache, step by step
tokenized_folder  turns texts into tokens, and back
sampling          chooses the next token from logits
generate          turns prompts into text
"""
