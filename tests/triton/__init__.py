COMPILED = ("test_variants.py",)
