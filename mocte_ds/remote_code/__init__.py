"""Code that lies beside the weights of an exported model: it needs torch and transformers alone, nothing of ours."""
