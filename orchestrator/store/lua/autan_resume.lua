-- autan_resume: reads a request from a token on, and may make the calling ingress its owner.
-- ARGV  id, tenant ("" = any), ingress_id, ingress_epoch, ingress_addr, from_index, take ("1": own it, "0": only look)
-- Reply OK, state, epoch, n, tokens from from_index on, reason, error, spec
--       | GONE (no such request of this tenant) | GAP, n (from_index > n) | STALE (take by an ended registration)
-- Promise: taking a live request fences the former owner at once and sends OWNER to the instances that run it.
-- A request that has ended keeps its last owner.
local function autan_resume(keys, args)
  local c = open('autan_resume', keys, args)
  local id = take_name(c, 'id')
  local tenant = take_bytes(c, 'tenant')
  local ingress = take_name(c, 'ingress_id')
  local ingress_epoch = take_epoch(c, 'ingress_epoch')
  local ingress_addr = take_bytes(c, 'ingress_addr')
  local from_index = take_int(c, 'from_index', 0)
  local wants = take_flag(c, 'take')
  taken_all(c)
  local r = load_request(c, id)
  if not r or (tenant ~= '' and r.tenant ~= tenant) then return {'GONE'} end
  local n = journal_length(c, id)
  if from_index > n then return {'GAP', n} end
  if wants and redis.call('HGET', k_ingress(c, ingress), 'epoch') ~= ingress_epoch then return stale(c) end
  if wants and LIVE[r.state] then
    disown(c, r)
    set(c, r, {ing = ingress, ing_epoch = ingress_epoch, ing_addr = ingress_addr})
    own(c, id, ingress, ingress_epoch)
    push_to_both(c, r, 'owner')
    if r.m_open == '1' then push(c, r.m, r.m_inc, 'owner', id, r.m_epoch) end
  end
  local rest = redis.call('GETRANGE', k_journal(c, id), from_index * 4, -1)
  local bulk = redis.call('HMGET', k_request(c, id), 'error', 'spec')
  return {'OK', r.state, r.epoch, n, rest, r.reason, bulk[1] or '', bulk[2] or ''}
end
redis.register_function{function_name = 'autan_resume', callback = autan_resume, flags = {'allow-oom'}}
