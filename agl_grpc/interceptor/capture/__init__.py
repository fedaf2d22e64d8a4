"""A captured call on its way to disk: what is recorded of it, in which form, and how it reaches the store.

Both forms of the interceptor use this: `inside` an engine, and in `front` of one.
"""
