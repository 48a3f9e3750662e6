"""A trained model's answers through the vLLM engine: does a backend cost accuracy?"""
