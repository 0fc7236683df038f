"""Loads exported folders as optimum-onnx and sentence-transformers do; runs in its own environment.

`python optimum_reader.py KIND FOLDER TEXT…` prints KIND's output for the texts as JSON. KIND is a class of
`optimum.onnxruntime`, or `SentenceTransformer` with its ONNX backend.
"""

import json
import sys


def main(kind: str, folder: str, *texts: str) -> None:
    if kind == "SentenceTransformer":
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(folder, backend="onnx", model_kwargs={"provider": "CPUExecutionProvider"})
        print(json.dumps(model.encode(list(texts)).tolist()))
        return
    import optimum.onnxruntime
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(list(texts), return_tensors="pt", padding=True)
    outputs = getattr(optimum.onnxruntime, kind).from_pretrained(folder)(**tokens)
    print(json.dumps(outputs[0].tolist()))


if __name__ == "__main__":
    main(*sys.argv[1:])
