COMPILED = ("test_variants.py", "test_staged.py", "test_staged_numbers.py")
