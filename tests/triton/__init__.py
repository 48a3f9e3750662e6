COMPILED = ("test_variants.py", "test_staged.py")
