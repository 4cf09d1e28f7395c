"""The ops: signature, argument checks, registration with torch.library, dispatch to a backend. No maths."""
