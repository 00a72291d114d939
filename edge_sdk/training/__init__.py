"""Training on the device: a bundle's graph, the device's own examples, one update.

`Trainer` (trainer.py) is what the device's loop sees. `OnnxTrainer` (onnx.py, onnxruntime, the default) and
`ExecutorchTrainer` (executorch.py, optional) are the same code (steps.py) on two engines. Which examples a step takes
comes from given entropy (sampling.py). Nothing here knows of rounds, noise or the network.
"""
