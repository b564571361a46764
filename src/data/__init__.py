"""Data: thin builders of data sets, and the loader that resumes at the very sample."""
