-- autan_submit: accepts a request, once for one id.
-- ARGV  id, body_hash, spec, tenant, model, prompt_tokens, max_tokens, prio (-1, 0, 1), timeout_ms,
--       ingress_id, ingress_epoch, ingress_addr, queue_limit
-- Reply OK, state, epoch, n, now_ms | DUPLICATE, state, epoch, n, now_ms (same tenant and body: nothing changed)
--       | CONFLICT (another body, or another tenant's id) | FULL, queued
-- Promise: after OK the request reaches exactly one terminal state. The only function that a full store refuses.
local PRIORITIES = {['-1'] = true, ['0'] = true, ['1'] = true}

local function autan_submit(keys, args)
  local c = open('autan_submit', keys, args)
  local id = take_name(c, 'id')
  local body_hash = take_bytes(c, 'body_hash')
  local spec = take_bytes(c, 'spec')
  local tenant = take_bytes(c, 'tenant')
  local model = take_bytes(c, 'model')
  local prompt_tokens = take_int(c, 'prompt_tokens', 0)
  local max_tokens = take_int(c, 'max_tokens', 0)
  local prio = take_one_of(c, 'prio', PRIORITIES)
  local timeout_ms = take_int(c, 'timeout_ms', 0)
  local ingress = take_name(c, 'ingress_id')
  local ingress_epoch = take_epoch(c, 'ingress_epoch')
  local ingress_addr = take_bytes(c, 'ingress_addr')
  local queue_limit = take_int(c, 'queue_limit', 0)
  taken_all(c)
  local key = k_request(c, id)
  local known = redis.call('HMGET', key, 'tenant', 'body_hash', 'state', 'epoch')
  if known[3] then
    if known[1] ~= tenant or known[2] ~= body_hash then return {'CONFLICT'} end
    return {'DUPLICATE', known[3], known[4], journal_length(c, id), text(c.now)}
  end
  local queued = redis.call('ZCARD', k(c, 'ready'))
  if queued >= queue_limit then return {'FULL', queued} end
  mark_generation(c)
  local order = (1 - tonumber(prio)) * CLASS_STEP + redis.call('HINCRBY', k(c, 'counters'), 'submitted', 1)
  local now, deadline = text(c.now), text(c.now + timeout_ms)
  redis.call('DEL', k_journal(c, id))
  redis.call('HSET', key, 'state', 'QUEUED', 'epoch', '0', 'spec', spec, 'body_hash', body_hash, 'tenant', tenant,
    'model', model, 'prompt_tokens', text(prompt_tokens), 'max_tokens', text(max_tokens), 'prio', prio,
    'submitted_ms', now, 'deadline_ms', deadline, 'attempts', '0', 'order', text(order),
    'ing', ingress, 'ing_epoch', ingress_epoch, 'ing_addr', ingress_addr)
  redis.call('ZADD', k(c, 'ready'), text(order), id)
  redis.call('ZADD', k(c, 'deadline'), deadline, id)
  redis.call('ZADD', k(c, 'live'), now, id)
  own(c, id, ingress, ingress_epoch)
  hint_core(c)
  return {'OK', 'QUEUED', '0', 0, now}
end
redis.register_function{function_name = 'autan_submit', callback = autan_submit}
