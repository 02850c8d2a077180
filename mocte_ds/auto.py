"""`import mocte_ds.auto` is mocte_ds.install(): deepspeed.initialize makes blocks where its config asks for them."""

from mocte_ds.integrations import install

install()
