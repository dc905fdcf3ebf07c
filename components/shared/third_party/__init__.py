"""The only modules that use private names of other libraries, one module for each library.

`tests/test_third_party.py` fails if a library changes such a name, and `tests/test_import_contract.py` if another module uses
one.
"""
