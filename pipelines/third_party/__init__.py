"""The only modules of the pipelines that use private or undocumented names of other libraries, one module for each library."""
