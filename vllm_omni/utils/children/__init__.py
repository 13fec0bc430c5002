"""Child processes that run a module of this package: started afresh, or forked from one that has done the imports."""
