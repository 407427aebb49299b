"""The models by themselves: what each computes, held against another implementation of the same."""
